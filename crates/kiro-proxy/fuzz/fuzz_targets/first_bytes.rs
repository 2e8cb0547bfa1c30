//! The first bytes of a connection to 15001: the guess of the protocol, and the scan of a head in pieces.
#![no_main]

use kiro_proxy::framing::{Guess, HeadScan, guess};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // A guess, once made, does not change when more bytes come.
    let mut settled = None;
    for end in 0..=data.len().min(32) {
        let guessed = guess(&data[..end]);
        match settled {
            None if guessed != Guess::NeedMore => settled = Some(guessed),
            Some(before) => assert_eq!(before, guessed),
            None => {}
        }
    }
    // A scan finds the same in one piece as in many.
    let mut whole = HeadScan::default();
    whole.read(data);
    let mut pieces = HeadScan::default();
    let size = data.first().map_or(1, |byte| usize::from(*byte) % 7 + 1);
    for piece in data.chunks(size) {
        pieces.read(piece);
    }
    assert_eq!(whole.oddities(), pieces.oddities());
});
