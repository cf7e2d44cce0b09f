//! The transition of a tenant from one tier to another as a pure machine: state and event in, state and actions out.
//! No I/O, no clock. The coordinator runs it; `state/tests.rs` checks this very code exhaustively.
//!
//! ```text
//!            every participant says yes                    every participant settled
//! Preparing ───────────────────────────▶ Committed ──────────────────────────────────▶ Done
//!     │        (one conditional write)      only forward: finish, again and again
//!     │ a no, the deadline, a cancellation
//!     └────────────────────────────────▶ Aborting ───────────────────────────────────▶ Aborted
//!              (one conditional write)      only back: restore, again and again
//! ```
//!
//! Invariants:
//! - The decision is made by one conditional write outside of this machine ([`Action::Decide`]) and never changes. Once
//!   a commit has been asked for, an abort is not, until the answer is known.
//! - A participant that may have been touched is settled before the transition closes; one that certainly was not
//!   ([`Step::Untouched`], [`Step::Refused`]) needs nothing on the way back.
//! - Every action may be repeated; every event may come twice or late.

use crate::{
    catalog::{Decision, Phase, Step},
    tenant::Protocol,
};

/// Databases that take part.
pub const SEATS: usize = Protocol::ALL.len();

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A coordinator takes the transition up; with what was decided before it came.
    Begun(Option<Decision>),
    /// A participant said yes.
    Prepared(usize),
    /// A participant said no and did nothing.
    Refused(usize),
    /// A call did not reach the participant.
    Failed(usize),
    /// A call got no answer: it may have been done, or be done yet.
    Unknown(usize),
    /// The pause after a failed call is over.
    Retry(usize),
    /// A participant finished or restored.
    Settled(usize),
    /// The time for preparing is over, or somebody called the transition off.
    GivenUp,
    /// The decision, as it was written.
    Decided(Decision),
    /// Whether the decision was written is not known.
    Undecided,
    /// The tenant's record was changed by somebody else: it can't be committed any more.
    Outdated,
    /// The end was written.
    Closed,
    /// Whether the end was written is not known.
    Unclosed,
}

/// What to do. All of it may be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Ask a participant whether it can, and to make room for the new limits beside the old.
    Prepare(usize),
    /// Write the decision, on condition that none was written.
    Decide(Decision),
    /// Bring a participant to the new limits.
    Finish(usize),
    /// Bring a participant back to the old limits.
    Restore(usize),
    /// Let a pause pass, then give [`Event::Retry`].
    Pause(usize),
    /// Write that it is over.
    Close,
}

/// The whole state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct State {
    /// How far the transition is.
    pub phase: Phase,
    /// How far each participant is, in the order of [`Protocol::ALL`].
    pub steps: [Step; SEATS],
    /// The decision that was asked to be written, while it is not known to be.
    pub wish: Option<Decision>,
}

impl State {
    /// The start of a transition with the participants that are there.
    pub fn new(present: [bool; SEATS]) -> Self {
        let steps = present.map(|is| if is { Step::Untouched } else { Step::Absent });
        Self { phase: Phase::Preparing, steps, wish: None }
    }

    /// What a later coordinator can rely on: calls of the earlier one may still be under way.
    #[must_use]
    pub fn taken_over(mut self) -> Self {
        self.wish = None;
        for step in &mut self.steps {
            if matches!(step, Step::Untouched | Step::Asked | Step::Refused) {
                *step = Step::Doubt;
            }
        }
        self
    }

    /// Takes an event.
    #[must_use]
    pub fn on(mut self, event: Event) -> (Self, Vec<Action>) {
        let actions = match event {
            Event::Begun(None) => self.prepare_all(),
            Event::Begun(Some(decision)) | Event::Decided(decision) => self.decided(decision),
            Event::Prepared(seat) => self.prepared(seat),
            Event::Refused(seat) => self.refused(seat),
            Event::Failed(seat) => self.failed(seat, false),
            Event::Unknown(seat) => self.failed(seat, true),
            Event::Retry(seat) => self.retry(seat),
            Event::Settled(seat) => self.settled(seat),
            Event::GivenUp | Event::Outdated if self.phase != Phase::Preparing => Vec::new(),
            // Once a commit was asked for, it may have been written.
            Event::GivenUp => {
                if self.wish.is_none() {
                    self.ask(Decision::Abort)
                } else {
                    Vec::new()
                }
            }
            Event::Outdated => self.ask(Decision::Abort),
            Event::Undecided => match self.wish {
                Some(wish) if self.phase == Phase::Preparing => vec![Action::Decide(wish)],
                _ => Vec::new(),
            },
            Event::Closed => {
                self.phase = self.phase.closed();
                Vec::new()
            }
            Event::Unclosed => self.close_if_settled(),
        };
        (self, actions)
    }

    fn ask(&mut self, decision: Decision) -> Vec<Action> {
        self.wish = Some(decision);
        vec![Action::Decide(decision)]
    }

    fn prepare_all(&mut self) -> Vec<Action> {
        if self.phase != Phase::Preparing || self.wish.is_some() {
            return Vec::new();
        }
        let mut actions = Vec::new();
        for (seat, step) in self.steps.iter_mut().enumerate() {
            match step {
                Step::Untouched => *step = Step::Asked,
                Step::Asked | Step::Doubt => {}
                Step::Absent | Step::Prepared | Step::Refused | Step::Settled => continue,
            }
            actions.push(Action::Prepare(seat));
        }
        if actions.is_empty() { self.commit_if_ready() } else { actions }
    }

    fn commit_if_ready(&mut self) -> Vec<Action> {
        let ready = self.steps.iter().all(|step| matches!(step, Step::Absent | Step::Prepared));
        if ready && self.wish.is_none() { self.ask(Decision::Commit) } else { Vec::new() }
    }

    fn prepared(&mut self, seat: usize) -> Vec<Action> {
        if self.phase != Phase::Preparing || !matches!(self.steps[seat], Step::Asked | Step::Doubt) {
            return Vec::new();
        }
        self.steps[seat] = Step::Prepared;
        self.commit_if_ready()
    }

    fn refused(&mut self, seat: usize) -> Vec<Action> {
        if self.phase != Phase::Preparing {
            return Vec::new();
        }
        match self.steps[seat] {
            Step::Asked => self.steps[seat] = Step::Refused,
            // This call did nothing; an earlier one may have.
            Step::Doubt => {}
            _ => return Vec::new(),
        }
        if self.wish.is_none() { self.ask(Decision::Abort) } else { Vec::new() }
    }

    fn failed(&mut self, seat: usize, may_be_done: bool) -> Vec<Action> {
        match (self.phase, self.steps[seat]) {
            (Phase::Preparing, Step::Asked | Step::Doubt) => {
                self.steps[seat] = match self.steps[seat] {
                    Step::Asked if !may_be_done => Step::Untouched,
                    _ => Step::Doubt,
                };
                if self.wish.is_none() { vec![Action::Pause(seat)] } else { Vec::new() }
            }
            (Phase::Committed, step) if !matches!(step, Step::Absent | Step::Settled) => vec![Action::Pause(seat)],
            (Phase::Aborting, Step::Asked | Step::Doubt | Step::Prepared) => vec![Action::Pause(seat)],
            _ => Vec::new(),
        }
    }

    fn retry(&mut self, seat: usize) -> Vec<Action> {
        match (self.phase, self.steps[seat]) {
            (Phase::Preparing, Step::Untouched | Step::Doubt) if self.wish.is_none() => {
                if self.steps[seat] == Step::Untouched {
                    self.steps[seat] = Step::Asked;
                }
                vec![Action::Prepare(seat)]
            }
            (Phase::Committed, step) if !matches!(step, Step::Absent | Step::Settled) => vec![Action::Finish(seat)],
            (Phase::Aborting, Step::Asked | Step::Doubt | Step::Prepared) => vec![Action::Restore(seat)],
            _ => Vec::new(),
        }
    }

    fn decided(&mut self, decision: Decision) -> Vec<Action> {
        if self.phase == Phase::Preparing {
            self.wish = None;
            self.phase = match decision {
                Decision::Commit => Phase::Committed,
                Decision::Abort => Phase::Aborting,
            };
        }
        let mut actions = Vec::new();
        for (seat, step) in self.steps.iter_mut().enumerate() {
            match (self.phase, &step) {
                (Phase::Committed, Step::Absent | Step::Settled) => {}
                (Phase::Committed, _) => actions.push(Action::Finish(seat)),
                (Phase::Aborting, Step::Asked | Step::Doubt | Step::Prepared) => actions.push(Action::Restore(seat)),
                _ => {}
            }
        }
        if actions.is_empty() { self.close_if_settled() } else { actions }
    }

    fn settled(&mut self, seat: usize) -> Vec<Action> {
        if self.phase.decision().is_none() || self.phase.is_closed() || self.steps[seat] == Step::Absent {
            return Vec::new();
        }
        self.steps[seat] = Step::Settled;
        self.close_if_settled()
    }

    fn close_if_settled(&mut self) -> Vec<Action> {
        let over = |step: &Step| match self.phase {
            Phase::Committed => matches!(step, Step::Absent | Step::Settled),
            Phase::Aborting => matches!(step, Step::Absent | Step::Settled | Step::Untouched | Step::Refused),
            _ => false,
        };
        if self.steps.iter().all(over) { vec![Action::Close] } else { Vec::new() }
    }
}

#[cfg(test)]
mod tests;
