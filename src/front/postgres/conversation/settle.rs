//! What outlives a transaction: settings, pins, a changed schema; taken over when its end is known.

use std::sync::Arc;

use super::{Conversation, Fault};
use crate::{
    front::postgres::{
        ledger::Fate,
        scan::{Shape, Track},
    },
    tenant::Protocol,
    upstream::postgres::connection::{Remote, Settings},
    usage,
    wire::postgres::backend::Status,
};

/// Most settings of a client that follow it, and their bytes; beyond, it is held to its connection.
const SETTINGS_MAX: usize = 128;
const SETTINGS_MAX_BYTES: usize = 16 * 1024;

impl Conversation {
    pub(super) fn note(&mut self, shape: Shape, remote: &mut Remote) {
        if shape.is_empty() || shape == Shape::PLAIN {
            return;
        }
        let pins = self.pins.and(shape.only(Shape::PINS.and(Shape::LARGE)));
        for (undoes, pin) in [
            (Shape::UNLOCKS_ALL, Shape::ADVISORY),
            (Shape::CLOSES_ALL, Shape::HOLD),
            (Shape::UNLISTENS_ALL, Shape::LISTENS),
        ] {
            if shape.has(undoes) && !shape.has(pin) {
                self.undoing = self.undoing.and(pin);
            } else if shape.has(pin) {
                self.undoing = self.undoing.without(pin);
            }
        }
        self.set_pins(pins);
        remote.soiled |= shape.has(Shape::HIDDEN) || !pins.is_empty();
        if shape.has(Shape::MOVES_SEQUENCE) {
            remote.sequences = true;
            self.moved_sequence = true;
        }
    }

    pub(super) fn set_pins(&mut self, pins: Shape) {
        if pins == self.pins {
            return;
        }
        for label in pins.without(self.pins).pin_labels() {
            usage::event::pinned(Protocol::Postgres, label);
        }
        self.pins = pins;
    }

    pub(super) fn ready(&mut self, status: Status, remote: &mut Remote) -> Result<Fate, Fault> {
        let fate = self.ledger.ready(status)?;
        self.answered += 1;
        while let Some((segment, ..)) = self.staged.front()
            && *segment < self.answered
        {
            // It may have run without a tag that says so: an Execute with a row limit ends before.
            if let Some((_, _, track)) = self.staged.pop_front()
                && track != Track::Nothing
            {
                self.done.push(Track::Unknown);
            }
        }
        self.changed = None;
        self.timed_out = None;
        if status != Status::Idle {
            // What was set inside a transaction may yet be rolled back: it is settled at its end.
            return Ok(fate);
        }
        self.paced = false;
        if std::mem::take(&mut self.changed_schema) {
            self.shared.raise_epoch();
        }
        if self.large_unnamed == Some(true) {
            self.large_unnamed = None;
            self.set_pins(self.pins.without(Shape::LARGE));
        }
        let explicit = self.committed || self.rolled_back;
        let undoing = std::mem::take(&mut self.undoing);
        if !self.failed && !self.rolled_back {
            self.set_pins(self.pins.without(undoing));
        }
        if explicit && (self.failed || self.rolled_back) {
            // All of it is undone, unless a part was kept by a savepoint or a COMMIT: then nobody knows which.
            if self.committed && self.done.iter().any(|track| *track != Track::Nothing) {
                self.done = vec![Track::Unknown];
            } else {
                self.done.clear();
            }
        }
        self.settle(remote);
        (self.committed, self.rolled_back, self.failed) = (false, false, false);
        Ok(fate)
    }

    /// Takes over what the client has SET, now that its transaction is over. The server has it already.
    pub(super) fn settle(&mut self, remote: &mut Remote) {
        for track in std::mem::take(&mut self.done) {
            let (wanted, applied) = match track {
                Track::Nothing => continue,
                Track::Unknown => {
                    self.set_pins(self.pins.and(Shape::SETS));
                    remote.soiled = true;
                    continue;
                }
                Track::Set(name, value)
                    if self.settings.len() >= SETTINGS_MAX
                        || self.settings.bytes() + name.len() + value.len() > SETTINGS_MAX_BYTES =>
                {
                    self.set_pins(self.pins.and(Shape::SETS));
                    remote.soiled = true;
                    continue;
                }
                Track::Set(name, value) => {
                    (self.settings.with(&name, value.clone()), remote.settings.with(&name, value))
                }
                Track::Reset(name) => {
                    let applied = remote.settings.without(&name);
                    let wanted = self.settings.without(&name);
                    // RESET goes back to the server's default; the client's startup packet said otherwise.
                    let wanted = match self.base.value(&name) {
                        Some(base) => wanted.with(&name, base.clone()),
                        None => wanted,
                    };
                    (wanted, applied)
                }
                Track::ResetAll => {
                    self.set_pins(self.pins.without(Shape::SETS));
                    (Settings::clone(&self.base), Settings::default())
                }
            };
            self.settings = self.shared.intern(wanted);
            remote.settings = if applied == *self.settings { Arc::clone(&self.settings) } else { Arc::new(applied) };
        }
    }
}
