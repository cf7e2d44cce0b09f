//! Room for large messages of all clients together. A small message costs no more than its client's share of the socket
//! cap; a large one, and a large reply, is lent room first, so that the sum stays bounded whatever clients do.
//!
//! ```text
//! header of a large message ─► room of its tenant, then of the process ─► read on
//!                                   └─ none in ROOM_WITHIN ─► read and thrown away, 462 with the labels to retry
//! header of a large reply ───► the same, other room ─► read on (while it waits, the request's own time runs)
//! ```
//!
//! Requests and replies have separate room: who holds room for a request waits for room for its reply, and who holds
//! that waits for nobody but its client, which [`super::client`] gives a bounded time.

use std::{sync::Arc, time::Duration};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    client::Client,
    inbox::Skipped,
    refuse::{self, After},
    send::Asked,
};
use crate::wire::mongo::{HEADER_BYTES, Header, OP_COMPRESSED};

/// Bytes from which on a message is lent room. Times the cap on sockets (10 000 by default), what is below stays within
/// some 2.5 GB even if every client leaves a message unfinished.
pub const LARGE_BYTES: usize = 256 << 10;

/// Room for the requests of all clients, in bytes, and as much for replies: five of the longest messages with what they
/// become.
const ROOM_BYTES: usize = 512 << 20;

/// One tenant's part of it: no tenant keeps the others waiting alone. The longest message fits, compressed too.
const TENANT_ROOM_BYTES: usize = 192 << 20;

/// Longest wait for room before a request is refused.
const ROOM_WITHIN: Duration = Duration::from_secs(5);

/// Longest time for a large message to come in, once it has room: 48 MB at 0.8 MB/s. Room is not for the slow to keep.
pub const RECEIVED_WITHIN: Duration = Duration::from_secs(60);

/// The unit that is counted in: a semaphore's permits are 32 bits.
const UNIT_BYTES: usize = 1 << 10;

/// Bytes up to the claimed size of what is compressed.
const CLAIM_AT: usize = HEADER_BYTES + 4;

/// Room for requests and for replies: of the process, or of a tenant.
#[derive(Debug)]
pub struct Rooms {
    requests: Arc<Semaphore>,
    replies: Arc<Semaphore>,
}

/// Room on loan; given back when dropped.
#[derive(Debug)]
pub struct Room {
    _process: OwnedSemaphorePermit,
    _tenant: OwnedSemaphorePermit,
}

impl Rooms {
    /// The process's.
    pub fn of_process() -> Self {
        Self::new(ROOM_BYTES)
    }

    /// A tenant's.
    pub fn of_tenant() -> Self {
        Self::new(TENANT_ROOM_BYTES)
    }

    fn new(bytes: usize) -> Self {
        let room = || Arc::new(Semaphore::new(bytes / UNIT_BYTES));
        Self { requests: room(), replies: room() }
    }

    /// Room for a request of so many bytes; `None` when there is none in time.
    ///
    /// # Cancel safety
    /// Dropping it takes nothing.
    pub async fn request(&self, tenant: &Self, bytes: usize) -> Option<Room> {
        tokio::time::timeout(ROOM_WITHIN, take(&self.requests, &tenant.requests, bytes)).await.ok().flatten()
    }

    /// Room for a reply of so many bytes, as long as that takes.
    ///
    /// # Cancel safety
    /// Dropping it takes nothing.
    pub async fn reply(&self, tenant: &Self, bytes: usize) -> Option<Room> {
        take(&self.replies, &tenant.replies, bytes).await
    }
}

/// The tenant's first, so that who waits for its own tenant holds nothing of the others'.
async fn take(process: &Arc<Semaphore>, tenant: &Arc<Semaphore>, bytes: usize) -> Option<Room> {
    // What is longer than a tenant's room is longer than any message: it is cut, not kept waiting for ever.
    let units = u32::try_from(bytes.min(TENANT_ROOM_BYTES) / UNIT_BYTES).unwrap_or(u32::MAX);
    let tenant = Arc::clone(tenant).acquire_many_owned(units).await.ok()?;
    let process = Arc::clone(process).acquire_many_owned(units).await.ok()?;
    Some(Room { _process: process, _tenant: tenant })
}

/// Bytes that a request of this header will take, itself and what it becomes; `None` for a small one, or where what
/// has come of it does not say yet. `max` is the cap on what its sender may send.
pub fn needed(header: &Header, bytes: &[u8], max: usize) -> Option<usize> {
    let inside = if header.opcode == OP_COMPRESSED {
        let claim = bytes.get(CLAIM_AT..)?.first_chunk()?;
        usize::try_from(i32::from_le_bytes(*claim)).unwrap_or(0).min(max)
    } else {
        0
    };
    let longest = header.length.max(inside);
    (longest > LARGE_BYTES).then(|| if inside == 0 { 2 * longest } else { header.length + 2 * inside })
}

/// Lends the message that a client has begun its room; where there is none in time it is thrown away, and its sender
/// told to try again.
pub async fn make_room(client: &mut Client, bytes: usize) -> After {
    let Some(tenancy) = &client.tenancy else { return After::Close };
    if let Some(room) = client.server.rooms.request(&tenancy.rooms, bytes).await {
        client.inbox.lend(room);
        return After::Stay;
    }
    metrics::counter!("dynabase_mongodb_large_refused_total").increment(1);
    client.count_refused();
    match tokio::time::timeout(RECEIVED_WITHIN, client.inbox.skip()).await {
        Ok(Ok(Skipped::Asked(id))) => client.answer(Asked::message(id), &refuse::no_room()).await,
        Ok(Ok(Skipped::Silent)) => After::Stay,
        // Whether an answer is wanted is not known: a closed connection is one that drivers retry on.
        Ok(Ok(Skipped::Unknown) | Err(_)) | Err(_) => After::Close,
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::wire::mongo::{MESSAGE_MAX_BYTES, OP_MSG};

    fn header(length: usize, opcode: i32) -> Header {
        Header { length, request_id: 1, response_to: 0, opcode }
    }

    #[test]
    fn what_a_message_takes_is_known_from_its_head() {
        let max = MESSAGE_MAX_BYTES;
        assert_eq!(needed(&header(LARGE_BYTES, OP_MSG), &[0; 30], max), None);
        assert_eq!(needed(&header(LARGE_BYTES + 1, OP_MSG), &[0; 16], max), Some(2 * LARGE_BYTES + 2));
        // A small one that claims to be a large one inside, and one that has not said so yet.
        let claims = |claim: i32| [&[0; 20][..], &claim.to_le_bytes(), &[2]].concat();
        assert_eq!(needed(&header(1000, OP_COMPRESSED), &claims(40_000_000)[..23], max), None);
        assert_eq!(needed(&header(1000, OP_COMPRESSED), &claims(40_000_000), max), Some(80_001_000));
        assert_eq!(needed(&header(1000, OP_COMPRESSED), &claims(i32::MAX), max), Some(1000 + 2 * max));
        assert_eq!(needed(&header(1000, OP_COMPRESSED), &claims(-1), max), None);
        // Who has not logged in can't send a large one.
        assert_eq!(needed(&header(1000, OP_COMPRESSED), &claims(i32::MAX), 64 << 10), None);
    }

    #[tokio::test]
    async fn one_tenant_takes_its_part_and_all_of_them_no_more_than_there_is() {
        let (process, one) = (Rooms::of_process(), Rooms::of_tenant());
        let large = MESSAGE_MAX_BYTES * 2;
        let now = |tenant: &Rooms, bytes: usize| process.request(tenant, bytes).now_or_never().flatten();
        let mine = [now(&one, large).expect("room"), now(&one, large).expect("room")];
        assert!(now(&one, large).is_none(), "a third is over the tenant's part");
        // Others have room meanwhile, and replies have their own.
        let tenants: Vec<Rooms> = (0..4).map(|_| Rooms::of_tenant()).collect();
        let others: Vec<Room> = tenants[..3].iter().map(|tenant| now(tenant, large).expect("room")).collect();
        assert!(process.reply(&one, large).now_or_never().is_some());
        assert!(now(&tenants[3], large).is_none(), "more than the process has");
        drop(mine);
        assert!(now(&tenants[3], large).is_some());
        assert!(now(&one, usize::MAX).is_some(), "what is cut fits");
        drop(others);
    }
}
