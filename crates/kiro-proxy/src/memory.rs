//! What does the process have to say about its memory, so that it holds little more than it uses?
//!
//! A sidecar uses a megabyte or two, and a host runs many of them: what the system and the allocator round up to is most of what
//! it would hold.

use std::hint::black_box;
use std::time::Duration;

/// How often what has been freed is given back to the system.
const EVERY: Duration = Duration::from_secs(1);

/// One of each kind of page that the allocator has for large blocks, the last of which is a page by itself; in this order one look after
/// the other finds all that is free. They are never written to, so the system gives no memory for them.
const BLOCKS_BYTES: [usize; 4] = [600 * 1024, 1200 * 1024, 2400 * 1024, 16 * 1024 * 1024];

/// Asks the system for small pages. Huge ones, which it gives where it sees a large range of memory, cost two megabytes for each of
/// the allocator's corners that is touched: three quarters of what an idle sidecar held, and nothing was faster for them.
///
/// To be called before threads are started. Where the system refuses, the sidecar is larger, and all else is the same.
pub fn small_pages() {
    let _ = rustix::thread::disable_transparent_huge_pages(true);
}

/// Gives back what has been freed, for as long as it is polled.
pub(crate) async fn give_back() {
    loop {
        tokio::time::sleep(EVERY).await;
        give_back_once();
    }
}

/// Lets the allocator give back what has been free for a while. It looks for that when a page becomes free and never else, so after
/// a thousand connections have come and gone it would wait, with all that they had, for the next ones.
pub fn give_back_once() {
    for bytes in BLOCKS_BYTES {
        drop(black_box(Vec::<u8>::with_capacity(black_box(bytes))));
    }
}
