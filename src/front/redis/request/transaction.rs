//! Transactions: queued here, sent in one piece.

use std::sync::atomic::Ordering;

use super::Burst;
use crate::front::redis::{
    client::{Queue, Step},
    commands::Row,
};
use crate::{
    upstream::redis::{link::How, reply::Transaction},
    wire::resp::put_request,
};

impl Burst<'_> {
    pub(super) fn transaction(&mut self, row: &Row) -> Result<(), Step> {
        match (row.name, self.client.queue.take()) {
            ("multi", None) => {
                self.client.queue = Some(Queue::default());
                self.local(b"+OK\r\n");
            }
            ("multi", open) => {
                self.client.queue = open;
                self.error("ERR MULTI calls can not be nested");
            }
            (name, None) => self.error(&format!("ERR {} without MULTI", name.to_uppercase())),
            ("discard", Some(queue)) => {
                self.unwatch();
                self.done(queue.creates);
                self.local(b"+OK\r\n");
            }
            (_, Some(queue)) if queue.dirty => {
                self.unwatch();
                self.done(queue.creates);
                self.error("EXECABORT Transaction discarded because of previous errors.");
            }
            (_, Some(queue)) => self.exec(queue),
        }
        Ok(())
    }

    pub(super) fn done(&self, creates: u64) {
        if let Some(tenancy) = &self.client.tenancy {
            tenancy.database.ledger.done(creates);
        }
    }

    fn unwatch(&mut self) {
        self.client.watched = 0;
        if std::mem::take(&mut self.client.watching)
            && let Some(state) = &mut self.state
        {
            state.out.extend_from_slice(b"*1\r\n$7\r\nUNWATCH\r\n");
            state.expect(&self.client.outbox, 1, 0, How::Discard);
            self.sent += 1;
        }
    }

    fn exec(&mut self, queue: Queue) {
        let Some(lost) = self.scripts_lost() else { return };
        self.client.watching = false;
        self.client.watched = 0;
        let Some(state) = &mut self.state else { return };
        for (sha, script) in &queue.scripts {
            if state.must_load(sha, lost) {
                put_request(&mut state.out, &[b"SCRIPT", b"LOAD", &script.text]);
                state.expect(&self.client.outbox, 1, 0, How::Discard);
                self.sent += 1;
            }
        }
        state.out.extend_from_slice(b"*1\r\n$5\r\nMULTI\r\n");
        state.out.extend_from_slice(&queue.bytes);
        state.out.extend_from_slice(b"*1\r\n$4\r\nEXEC\r\n");
        let acks = queue.elements.len() + 1;
        let transaction = Transaction { acks, elements: queue.elements, single: false, refused: None };
        self.expect(acks + 1, queue.creates, How::Transaction(Box::new(transaction)));
        self.count_keys();
    }

    pub(super) fn scripts_lost(&self) -> Option<u64> {
        let tenancy = self.client.tenancy.as_ref()?;
        Some(tenancy.database.ledger.scripts_lost.load(Ordering::Relaxed))
    }
}
