//! Can a container's user read what is mounted into it?
//!
//! Asked on the host, as somebody else than that user: so by owner, group and mode bits, as the kernel will ask it.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Who a container runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ids {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// Whether `ids` may read a file, or enter and list a directory. `None` where there is nothing.
pub(super) fn may_read(path: &Path, ids: Ids) -> Option<bool> {
    let metadata = std::fs::metadata(path).ok()?;
    let wanted = if metadata.is_dir() { 0o5 } else { 0o4 };
    Some(granted(metadata.mode(), metadata.uid(), metadata.gid(), ids) & wanted == wanted)
}

/// The three bits that count for `ids`: the first class that fits, even where a later one would give more.
fn granted(mode: u32, owner: u32, group: u32, ids: Ids) -> u32 {
    let class = if ids.uid == owner {
        6
    } else if ids.gid == group {
        3
    } else {
        0
    };
    (mode >> class) & 0o7
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_class_that_fits_decides() {
        let ids = Ids { uid: 5, gid: 7 };
        assert_eq!(granted(0o640, 5, 0, ids), 0o6);
        assert_eq!(granted(0o640, 0, 7, ids), 0o4);
        assert_eq!(granted(0o640, 0, 0, ids), 0o0);
        assert_eq!(granted(0o044, 5, 7, ids), 0o0, "an owner without bits is not helped by the others'");
        assert_eq!(granted(0o604, 0, 7, ids), 0o0);
        assert_eq!(granted(0o604, 0, 0, ids), 0o4);
    }
}
