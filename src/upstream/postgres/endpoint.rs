//! One server as connections reach it: how it is dialled, and whether it is awake.
//!
//! A server that sleeps is woken by one connection; the others wait for it. Where nothing ever sleeps, nobody waits.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Semaphore, SemaphorePermit},
};

use super::dial::Target;

/// A server that was reached this recently is awake: the shortest time after which one goes to sleep is a minute.
const AWAKE: Duration = Duration::from_secs(30);

/// Longest time for a cancel request, from dialling to the server's closing.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// The code of a CancelRequest.
const CANCEL_REQUEST: u32 = 80_877_102;

/// A server.
#[derive(Debug)]
pub struct Endpoint {
    target: Target,
    /// One at a time while it may be asleep.
    waking: Semaphore,
    /// When it was last seen awake.
    awake: Mutex<Option<Instant>>,
}

impl Endpoint {
    /// The server at `target`.
    pub fn new(target: Target) -> Self {
        Self { target, waking: Semaphore::new(1), awake: Mutex::new(None) }
    }

    /// How it is dialled.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Notes that it was reached just now.
    pub(super) fn is_up(&self) {
        *self.awake.lock() = Some(Instant::now());
    }

    /// Waits for whoever is waking it, until `deadline` at the longest; `None` where nobody need wait.
    pub(super) async fn turn(&self, deadline: Instant) -> Option<SemaphorePermit<'_>> {
        if self.awake.lock().is_some_and(|at| at.elapsed() < AWAKE) {
            return None;
        }
        tokio::time::timeout_at(deadline.into(), self.waking.acquire()).await.ok().and_then(Result::ok)
    }

    /// Asks it to cancel what the backend with this key is doing, and waits until it has taken the request, so that
    /// the cancel can't hit what runs there next.
    pub async fn cancel(&self, key: &[u8]) -> bool {
        let mut request = Vec::with_capacity(8 + key.len());
        request.extend_from_slice(&u32::try_from(8 + key.len()).unwrap_or(0).to_be_bytes());
        request.extend_from_slice(&CANCEL_REQUEST.to_be_bytes());
        request.extend_from_slice(key);
        let sent = async {
            let mut stream = self.target.dial().await.ok()?;
            stream.write_all(&request).await.ok()?;
            let mut end = [0; 1];
            // The server closes without a word once it has signalled the backend.
            let _ = stream.read(&mut end).await;
            Some(())
        };
        matches!(tokio::time::timeout(CANCEL_TIMEOUT, sent).await, Ok(Some(())))
    }
}
