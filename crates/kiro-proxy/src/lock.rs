//! What becomes of a lock whose holder panicked?

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks; what a panic left behind is taken as it is, since no holder leaves anything half done.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
