//! The cursors that a request names. `killCursors` of cursors that this process does not know as the tenant's is
//! answered here: to ask the server would let a tenant send it any number of ids. One that another process opened is
//! closed by that process, or by the server, when it was idle for long.

use super::{mask::Mask, refuse::put_not_there, rewrite::Forward, tenancy::Tenancy};
use crate::wire::{
    Error,
    mongo::{
        self, HEADER_BYTES, Message,
        bson::{self, Index},
    },
};

/// The cursors of a `killCursors` as the server knows them.
#[derive(Debug, Default)]
pub struct Named {
    /// The tenant's.
    pub known: Vec<i64>,
    /// All others.
    pub others: Vec<i64>,
}

impl Named {
    /// Those that a rewritten request names.
    pub fn read(tenancy: &Tenancy, forward: &Forward<'_>, sent: &[u8]) -> Self {
        let ids = forward.ids.iter().filter_map(|&at| sent.get(at..at + 8)?.try_into().ok()).map(i64::from_le_bytes);
        let (known, others) = ids.partition(|&id| tenancy.has_cursor(id));
        Self { known, others }
    }

    /// The answer where none is known.
    ///
    /// # Errors
    /// An id can't be hidden.
    pub fn put_unknown(&self, mask: &Mask, out: &mut Vec<u8>) -> Result<(), Error> {
        let body = bson::open(out);
        for name in ["cursorsKilled", "cursorsAlive", "cursorsUnknown"] {
            let none = bson::open_array(out, name);
            bson::close(out, none);
        }
        let list = bson::open_array(out, "cursorsNotFound");
        put_not_there(mask, &self.others, 0, out)?;
        bson::close(out, list);
        bson::put_f64(out, "ok", 1.0);
        bson::close(out, body);
        Ok(())
    }

    /// Writes the request anew with the tenant's cursors alone.
    ///
    /// # Errors
    /// It is not one of ours.
    pub fn leave_known(&self, sent: &mut Vec<u8>) -> Result<(), Error> {
        let fault = Error { at: "killCursors", what: "not a message" };
        let mut out = Vec::with_capacity(sent.len());
        {
            let (head, payload) = sent.split_first_chunk::<HEADER_BYTES>().ok_or(fault)?;
            let message = Message::parse(head, payload)?;
            out.extend_from_slice(&sent[..HEADER_BYTES + 5]);
            let body = bson::open(&mut out);
            for element in message.body {
                let element = element?;
                if element.key != b"cursors" {
                    bson::put(&mut out, &element);
                    continue;
                }
                let list = bson::open_array(&mut out, "cursors");
                for (at, &id) in self.known.iter().enumerate() {
                    bson::put_i64(&mut out, Index::new(at).as_str(), id);
                }
                bson::close(&mut out, list);
            }
            bson::close(&mut out, body);
        }
        mongo::end(&mut out, 0);
        *sent = out;
        Ok(())
    }
}

/// The first cursor that a rewritten request names, as the server knows it.
pub fn asked_for(forward: &Forward<'_>, sent: &[u8]) -> Option<i64> {
    forward.ids.first().and_then(|&at| sent.get(at..at + 8)?.try_into().ok()).map(i64::from_le_bytes)
}
