//! Who looks whether a server still answers while tenants' scripts run on it.
//!
//! A server runs one script at a time and nothing beside it. The prelude counts what a script does, so none runs for
//! ever; what it can't count is work inside one call (a pattern that goes back and forth, a very long string). From
//! `busy-reply-threshold` on (5 s) the server answers everybody with `BUSY`, and can be told to end the script:
//!
//! ```text
//!   a tenant's script ──▶ guarded(server) ── once a second, on a connection of its own: PING
//!       PONG ──▶ fine · no script for a while ──▶ gone
//!       BUSY ──▶ SCRIPT KILL or FUNCTION KILL, whichever it asks for ──▶ counted
//! ```
//!
//! The same connection empties the server's cache of scripts once much was sent there: it forgets none by itself.

use std::{
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Upstream,
    dial::{self, CONNECT_TIMEOUT, DialError},
};
use crate::{
    net::Stream,
    usage::event::{self, Outcome},
    wire::resp::put_request,
};

/// How often it looks.
const LOOK: Duration = Duration::from_secs(1);

/// How long it looks after the last script.
const LINGER: Duration = Duration::from_secs(30);

/// Bytes of scripts after which the server's cache is emptied. Each is there once per tenant that uses it.
const CACHE_MAX_BYTES: u64 = 256 << 20;

impl Upstream {
    /// A tenant's script is sent to the server of a slot.
    pub(super) fn guard(self: &Arc<Self>, slot: u16) {
        let Some(address) = self.nodes.known(slot) else { return };
        let before = self.guarded.lock().insert(Arc::clone(&address), Instant::now());
        if before.is_none() {
            tokio::spawn(watch(Arc::downgrade(self), address));
        }
    }

    /// A server's cache of scripts was emptied: who calls one that was loaded before loads it again.
    fn scripts_are_lost(&self) {
        for place in self.places.iter().filter_map(|entry| entry.upgrade()) {
            for database in place.all() {
                database.ledger.scripts_lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Ends with the upstream, or some time after the last script.
async fn watch(upstream: Weak<Upstream>, address: Arc<str>) {
    let mut kept = None;
    let mut sent = upstream.upgrade().map_or(0, |upstream| upstream.script_bytes.load(Ordering::Relaxed));
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(upstream) = upstream.upgrade() else { return };
        {
            let mut guarded = upstream.guarded.lock();
            if guarded.get(&address).is_none_or(|last| last.elapsed() > LINGER) {
                guarded.remove(&address);
                return;
            }
        }
        let look = tokio::time::timeout(CONNECT_TIMEOUT, look(&upstream, &address, kept.take(), &mut sent));
        match look.await.unwrap_or(Err(DialError::Slow)) {
            Ok(stream) => kept = Some(stream),
            Err(error) => tracing::debug!(%address, %error, "a server that runs scripts does not answer"),
        }
    }
}

async fn look(upstream: &Upstream, address: &str, kept: Option<Stream>, sent: &mut u64) -> Result<Stream, DialError> {
    let mut ask = Vec::new();
    let mut logins = 0;
    let mut stream = match kept {
        Some(stream) => stream,
        // Logging in is possible while the server is busy; nothing else is.
        None => {
            let target = upstream.nodes.target();
            logins = target.put_login(&mut ask);
            target.connect(address).await?
        }
    };
    put_request(&mut ask, &[b"PING"]);
    let answers = dial::exchange(&mut stream, &ask, logins + 1).await?;
    let Some((pong, logins)) = answers.split_last() else { return Ok(stream) };
    logins.iter().try_for_each(|answer| dial::refused(answer))?;
    if pong.starts_with(b"-BUSY") {
        ask.clear();
        // It takes the one for what it runs, and names it.
        let function = memchr::memmem::find(pong, b"FUNCTION KILL").is_some();
        put_request(&mut ask, &[if function { b"FUNCTION" } else { b"SCRIPT" }, b"KILL"]);
        let answers = dial::exchange(&mut stream, &ask, 1).await?;
        match dial::refused(&answers[0]) {
            Ok(()) => {
                event::script_stopped(Outcome::Ok);
                tracing::warn!(%address, "a script kept the server busy and was ended");
            }
            // It ended by itself.
            Err(DialError::Refused(text)) if text.starts_with("NOTBUSY") => {}
            // It has written: the server would have to go down with it.
            Err(error) => {
                event::script_stopped(Outcome::Failed);
                tracing::warn!(%address, %error, "a script keeps the server busy");
            }
        }
        return Ok(stream);
    }
    let total = upstream.script_bytes.load(Ordering::Relaxed);
    if total.saturating_sub(*sent) > CACHE_MAX_BYTES {
        ask.clear();
        put_request(&mut ask, &[b"SCRIPT", b"FLUSH", b"ASYNC"]);
        let answers = dial::exchange(&mut stream, &ask, 1).await?;
        upstream.scripts_are_lost();
        dial::refused(&answers[0])?;
        *sent = total;
        tracing::info!(%address, "the cache of scripts was emptied");
    }
    Ok(stream)
}
