//! Which answers are owed: one entry for every request that an upstream server has been sent, in order.
//!
//! A connection may go back to its pool only when nothing is owed; a reply may reach the client only if the client
//! asked for it; what we answer ourselves comes out in its place. The rules follow the server's own main loop:
//! - an error in the extended protocol makes the server skip everything up to the next Sync, a Query included;
//! - a COPY from the client makes it ignore Flush and Sync until the copy ends.

use std::collections::VecDeque;

use crate::wire::postgres::backend::Status;

/// What kind of answer is owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owed {
    /// ParseComplete.
    Parse,
    /// BindComplete.
    Bind,
    /// RowDescription or NoData, of a portal.
    Describe,
    /// ParameterDescription, then RowDescription or NoData, of a statement.
    DescribeStatement,
    /// CommandComplete, EmptyQueryResponse or PortalSuspended.
    Execute,
    /// CloseComplete.
    Close,
    /// ReadyForQuery.
    Sync,
    /// Results, then ReadyForQuery.
    Query,
    /// A function's result, then ReadyForQuery.
    Call,
    /// CommandComplete `DEALLOCATE` and ReadyForQuery, always ours.
    Deallocate,
    /// Nothing: the client ended COPY data before it knew whether the server would take any.
    CopyEnd,
}

impl Owed {
    fn is_extended(self) -> bool {
        matches!(
            self,
            Owed::Parse | Owed::Bind | Owed::Describe | Owed::DescribeStatement | Owed::Execute | Owed::Close
        )
    }
}

/// Who gets the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The client.
    Forward,
    /// Nobody: we asked.
    Swallow,
    /// The client, from us: the server was not asked.
    Invent,
}

/// What to do with a message from the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Give it to the client.
    Forward,
    /// Keep it from the client.
    Drop,
}

/// The server said something that nobody asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unasked;

/// Entries whose space a sleeping client keeps: two bytes each.
const KEPT: usize = 16;

/// The ledger of one client's upstream connection.
#[derive(Debug)]
pub struct Ledger {
    queue: VecDeque<(Owed, How)>,
    /// The server is skipping to the next Sync, which has not been sent yet.
    skipping: bool,
    /// Extended messages have been sent since the last Sync: an implicit transaction may be open.
    open: bool,
    copy_in: bool,
    status: Status,
    completed: u64,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            skipping: false,
            open: false,
            copy_in: false,
            status: Status::Idle,
            completed: 0,
        }
    }
}

impl Ledger {
    /// Whether nothing is owed and no transaction, not even an implicit one, is open.
    pub fn is_idle(&self) -> bool {
        self.status == Status::Idle && self.is_settled() && !self.open
    }

    /// Whether nothing is owed and no data expected.
    pub fn is_settled(&self) -> bool {
        self.queue.is_empty() && !self.copy_in && !self.skipping
    }

    /// The transaction status as last reported.
    pub fn status(&self) -> Status {
        self.status
    }

    /// Whether the server waits for the client's COPY data.
    pub fn copies_in(&self) -> bool {
        self.copy_in
    }

    /// Whether the next answer describes a statement.
    pub fn describes_statement(&self) -> bool {
        matches!(self.queue.front(), Some((Owed::DescribeStatement, _)))
    }

    /// Statements completed, ever.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// Whether what is sent now will be skipped by the server.
    pub fn is_skipping(&self) -> bool {
        self.skipping
    }

    /// Gives the memory of a long pipeline back; what a usual one needs is kept.
    pub fn shrink(&mut self) {
        if self.queue.is_empty() && self.queue.capacity() > KEPT {
            self.queue = VecDeque::new();
        }
    }

    /// Notes a request; tells whether an answer will come (what the server skips has none).
    pub fn push(&mut self, owed: Owed, how: How) -> bool {
        if owed == Owed::Sync {
            // During a copy the server ignores it; the Sync behind the data is the one that counts.
            if self.copy_in {
                return false;
            }
            self.skipping = false;
            self.open = false;
        } else if self.skipping {
            return false;
        } else if owed.is_extended() {
            self.open = true;
        }
        self.queue.push_back((owed, how));
        true
    }

    /// The client ended its COPY data. Some send data and end right behind the COPY statement.
    pub fn end_copy(&mut self) {
        if !std::mem::take(&mut self.copy_in) && !self.queue.is_empty() && !self.skipping {
            self.queue.push_back((Owed::CopyEnd, How::Forward));
        }
    }

    /// Takes an invented answer whose turn has come.
    pub fn take_invented(&mut self) -> Option<Owed> {
        match self.queue.front() {
            Some(&(owed, How::Invent)) => {
                self.queue.pop_front();
                self.completed += u64::from(owed == Owed::Deallocate);
                Some(owed)
            }
            _ => None,
        }
    }

    /// Notes a message from the server; `dropped` is told of every entry that gets no answer because of it.
    /// For ReadyForQuery use [`Self::ready`].
    ///
    /// # Errors
    /// [`Unasked`]: the server and we disagree about the protocol; the connection is of no use any more.
    #[inline]
    pub fn answer(&mut self, kind: u8, mut dropped: impl FnMut(Owed, How)) -> Result<Fate, Unasked> {
        // Asynchronous messages belong to no request. Their fate is decided by who reads them.
        if matches!(kind, b'N' | b'A' | b'S') {
            return Ok(Fate::Forward);
        }
        let Some(&(owed, how)) = self.queue.front() else {
            return if kind == b'E' { Ok(Fate::Forward) } else { Err(Unasked) };
        };
        let fate = if how == How::Forward { Fate::Forward } else { Fate::Drop };
        let settles = match (kind, owed) {
            (b'D', Owed::Execute | Owed::Query) => return Ok(fate),
            (b'1', Owed::Parse)
            | (b'2', Owed::Bind)
            | (b'3', Owed::Close)
            | (b'T' | b'n', Owed::Describe | Owed::DescribeStatement) => true,
            (b't', Owed::DescribeStatement) => false,
            (b'C' | b'I', Owed::Execute) => {
                self.completed += 1;
                true
            }
            (b's', Owed::Execute) => true,
            (b'C' | b'I', Owed::Query) => {
                self.completed += 1;
                false
            }
            (b'T' | b'd' | b'c', Owed::Query) | (b'd' | b'c', Owed::Execute) | (b'V', Owed::Call) => false,
            (b'H' | b'W', Owed::Query | Owed::Execute) => false,
            (b'G', Owed::Query | Owed::Execute) => {
                self.copy_in = true;
                // The server ignores every Sync that was sent before the end of the data.
                while let Some((ignored @ (Owed::Sync | Owed::CopyEnd), how)) = self.queue.get(1).copied() {
                    self.queue.remove(1);
                    if ignored == Owed::CopyEnd {
                        self.copy_in = false;
                        break;
                    }
                    dropped(ignored, how);
                }
                false
            }
            (b'E', _) => {
                self.fail(owed, &mut dropped);
                // An error in what we injected is the client's to hear, unless it is a whole Query of ours.
                return Ok(if owed == Owed::Query { fate } else { Fate::Forward });
            }
            _ => return Err(Unasked),
        };
        if settles {
            self.pop();
        }
        Ok(fate)
    }

    /// Notes a ReadyForQuery.
    ///
    /// # Errors
    /// [`Unasked`], as [`Self::answer`].
    pub fn ready(&mut self, status: Status) -> Result<Fate, Unasked> {
        match self.pop() {
            Some((owed @ (Owed::Sync | Owed::Query | Owed::Call), how)) => {
                self.status = status;
                self.copy_in = false;
                // A Query ends the implicit transaction of what was sent before it without a Sync.
                if owed == Owed::Query && !self.queue.iter().any(|(owed, _)| owed.is_extended()) {
                    self.open = false;
                }
                Ok(if how == How::Forward { Fate::Forward } else { Fate::Drop })
            }
            _ => Err(Unasked),
        }
    }

    /// Takes the entry at the front, and the ends of COPY data behind it that found no COPY.
    fn pop(&mut self) -> Option<(Owed, How)> {
        let entry = self.queue.pop_front();
        while self.queue.front().is_some_and(|(owed, _)| *owed == Owed::CopyEnd) {
            self.queue.pop_front();
        }
        entry
    }

    fn fail(&mut self, owed: Owed, dropped: &mut impl FnMut(Owed, How)) {
        self.copy_in = false;
        if !owed.is_extended() {
            return;
        }
        while let Some(&(owed, how)) = self.queue.front() {
            if owed == Owed::Sync {
                return;
            }
            dropped(owed, how);
            self.queue.pop_front();
        }
        self.skipping = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(ledger: &mut Ledger, kinds: &[u8]) -> Vec<Fate> {
        kinds
            .iter()
            .map(|&kind| match kind {
                b'Z' => ledger.ready(Status::Idle),
                kind => ledger.answer(kind, |_, _| {}),
            })
            .map(|fate| fate.expect("asked for"))
            .collect()
    }

    fn extended(ledger: &mut Ledger) {
        for owed in [Owed::Parse, Owed::Bind, Owed::Describe, Owed::Execute, Owed::Sync] {
            ledger.push(owed, How::Forward);
        }
    }

    #[test]
    fn nothing_is_released_before_every_sync_is_answered() {
        let mut ledger = Ledger::default();
        extended(&mut ledger);
        extended(&mut ledger);
        feed(&mut ledger, b"12TDDCZ");
        assert!(!ledger.is_idle(), "the second pipeline is still owed");
        feed(&mut ledger, b"12nCZ");
        assert!(ledger.is_idle());
    }

    #[test]
    fn a_query_sent_while_the_server_skips_gets_no_answer() {
        let mut ledger = Ledger::default();
        ledger.push(Owed::Parse, How::Forward);
        feed(&mut ledger, b"E");
        assert!(!ledger.push(Owed::Query, How::Forward));
        ledger.push(Owed::Sync, How::Forward);
        feed(&mut ledger, b"Z");
        assert!(ledger.is_idle());
    }

    #[test]
    fn a_query_queued_before_the_error_was_seen_is_dropped_with_the_rest() {
        let mut ledger = Ledger::default();
        ledger.push(Owed::Parse, How::Forward);
        ledger.push(Owed::Query, How::Forward);
        ledger.push(Owed::Sync, How::Forward);
        let mut lost = Vec::new();
        ledger.answer(b'E', |owed, _| lost.push(owed)).unwrap();
        assert_eq!(lost, [Owed::Parse, Owed::Query]);
        feed(&mut ledger, b"Z");
        assert!(ledger.is_idle());
    }

    #[test]
    fn after_a_flush_the_implicit_transaction_stays_open() {
        let mut ledger = Ledger::default();
        ledger.push(Owed::Parse, How::Forward);
        feed(&mut ledger, b"1");
        assert!(ledger.is_settled() && !ledger.is_idle());
    }

    #[test]
    fn syncs_sent_before_a_copy_began_are_not_answered() {
        let mut ledger = Ledger::default();
        for owed in [Owed::Parse, Owed::Bind, Owed::Execute, Owed::Sync] {
            ledger.push(owed, How::Forward);
        }
        feed(&mut ledger, b"12G");
        assert!(!ledger.push(Owed::Sync, How::Forward), "ignored during the copy");
        ledger.end_copy();
        ledger.push(Owed::Sync, How::Forward);
        feed(&mut ledger, b"CZ");
        assert!(ledger.is_idle());
    }

    #[test]
    fn copy_data_may_come_before_the_server_asks_for_it() {
        for request in [Owed::Query, Owed::Execute] {
            let mut ledger = Ledger::default();
            ledger.push(request, How::Forward);
            ledger.end_copy();
            if request == Owed::Execute {
                ledger.push(Owed::Sync, How::Forward);
            }
            feed(&mut ledger, b"G");
            assert!(!ledger.copies_in(), "the end is on its way already");
            feed(&mut ledger, b"CZ");
            assert!(ledger.is_idle());
        }
    }

    #[test]
    fn an_end_of_data_without_a_copy_is_ignored_as_the_server_does() {
        let mut ledger = Ledger::default();
        ledger.push(Owed::Query, How::Forward);
        ledger.end_copy();
        feed(&mut ledger, b"CZ");
        assert!(ledger.is_idle());
    }

    #[test]
    fn a_query_ends_an_implicit_transaction() {
        let mut ledger = Ledger::default();
        ledger.push(Owed::Parse, How::Forward);
        ledger.push(Owed::Query, How::Forward);
        feed(&mut ledger, b"1CZ");
        assert!(ledger.is_idle());
    }

    #[test]
    fn invented_answers_wait_for_their_turn_and_die_with_an_error() {
        let mut ledger = Ledger::default();
        ledger.push(Owed::Bind, How::Forward);
        ledger.push(Owed::Close, How::Invent);
        ledger.push(Owed::Sync, How::Forward);
        assert_eq!(ledger.take_invented(), None);
        feed(&mut ledger, b"2");
        assert_eq!(ledger.take_invented(), Some(Owed::Close));
        feed(&mut ledger, b"Z");
        ledger.push(Owed::Bind, How::Forward);
        ledger.push(Owed::Close, How::Invent);
        feed(&mut ledger, b"E");
        assert_eq!(ledger.take_invented(), None);
    }

    #[test]
    fn a_server_that_answers_what_nobody_asked_is_found_out() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.answer(b'C', |_, _| {}), Err(Unasked));
        assert_eq!(ledger.ready(Status::Idle), Err(Unasked));
        ledger.push(Owed::Parse, How::Forward);
        assert_eq!(ledger.answer(b'D', |_, _| {}), Err(Unasked));
        assert_eq!(ledger.answer(b'E', |_, _| {}), Ok(Fate::Forward));
    }

    #[test]
    fn what_we_asked_is_kept_from_the_client() {
        let mut ledger = Ledger::default();
        ledger.push(Owed::Parse, How::Swallow);
        ledger.push(Owed::Query, How::Swallow);
        assert_eq!(feed(&mut ledger, b"1TDCZ"), [Fate::Drop; 5]);
    }
}
