//! The machine alone, and the machine in a world that fails in every way (`stateright` walks all of it).

use std::hash::Hash;

use stateright::{Checker, Model, Property, Representative};

use super::*;

const ALL: [bool; SEATS] = [true; SEATS];

fn run(state: State, events: &[Event]) -> (State, Vec<Action>) {
    events.iter().fold((state, Vec::new()), |(state, _), event| state.on(*event))
}

#[test]
fn the_straight_way() {
    let (state, actions) = State::new(ALL).on(Event::Begun(None));
    assert_eq!(actions, (0..5).map(Action::Prepare).collect::<Vec<_>>());
    let (state, actions) = run(state, &[0, 1, 2, 3, 4].map(Event::Prepared));
    assert_eq!(actions, [Action::Decide(Decision::Commit)]);
    let (state, actions) = state.on(Event::Decided(Decision::Commit));
    assert_eq!(actions, (0..5).map(Action::Finish).collect::<Vec<_>>());
    let (state, actions) = run(state, &[4, 3, 2, 1, 0].map(Event::Settled));
    assert_eq!(actions, [Action::Close]);
    assert_eq!(state.on(Event::Closed).0.phase, Phase::Done);
}

#[test]
fn one_no_takes_everybody_back_but_the_one_who_said_it() {
    let (state, _) = State::new(ALL).on(Event::Begun(None));
    let (state, actions) = run(state, &[Event::Prepared(0), Event::Refused(4)]);
    assert_eq!(actions, [Action::Decide(Decision::Abort)]);
    let (state, actions) = run(state, &[Event::Prepared(1), Event::Failed(2), Event::Decided(Decision::Abort)]);
    // 2 was never reached and 4 said no: nothing to take back there. 3 has not answered.
    assert_eq!(actions, [0, 1, 3].map(Action::Restore));
    let (state, actions) = run(state, &[0, 1, 3].map(Event::Settled));
    assert_eq!(actions, [Action::Close]);
    assert_eq!(state.on(Event::Closed).0.phase, Phase::Aborted);
}

#[test]
fn an_installation_without_databases_commits_at_once() {
    let (state, actions) = State::new([false; SEATS]).on(Event::Begun(None));
    assert_eq!(actions, [Action::Decide(Decision::Commit)]);
    assert_eq!(state.on(Event::Decided(Decision::Commit)).1, [Action::Close]);
}

#[test]
fn it_can_be_called_off_before_the_commit_is_asked_for_and_not_after() {
    let (asked, _) = State::new([true, false, false, false, false]).on(Event::Begun(None));
    assert_eq!(asked.on(Event::GivenUp).1, [Action::Decide(Decision::Abort)]);
    let (deciding, _) = asked.on(Event::Prepared(0));
    assert_eq!(deciding.on(Event::GivenUp).1, []);
    assert_eq!(deciding.on(Event::Undecided).1, [Action::Decide(Decision::Commit)]);
    let (committed, _) = deciding.on(Event::Decided(Decision::Commit));
    for event in [Event::GivenUp, Event::Outdated, Event::Decided(Decision::Abort), Event::Refused(0)] {
        assert_eq!(committed.on(event).0.phase, Phase::Committed, "{event:?}");
    }
}

#[test]
fn a_record_that_was_changed_by_somebody_else_is_not_overwritten() {
    let (state, _) = run(State::new([true, false, false, false, false]), &[Event::Begun(None), Event::Prepared(0)]);
    assert_eq!(state.on(Event::Outdated).1, [Action::Decide(Decision::Abort)]);
}

#[test]
fn a_later_coordinator_doubts_what_it_did_not_see() {
    let (state, _) = State::new(ALL).on(Event::Begun(None));
    let (state, _) = run(state, &[Event::Prepared(0), Event::Refused(1), Event::Failed(2)]);
    let (later, actions) = state.taken_over().on(Event::Begun(Some(Decision::Abort)));
    assert_eq!(later.phase, Phase::Aborting);
    assert_eq!(actions, (0..5).map(Action::Restore).collect::<Vec<_>>());
}

// The world.

/// What stands on a participant: ordered by the coordinator's fence, then by stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Call {
    Prepare,
    Finish,
    Restore,
}

impl Call {
    const ALL: [Call; 3] = [Call::Prepare, Call::Finish, Call::Restore];

    /// The ordering that participants keep: whatever settles comes after whatever prepares.
    fn stage(self) -> u8 {
        match self {
            Call::Prepare => 1,
            Call::Finish | Call::Restore => 2,
        }
    }
}

/// One participant with all that anybody knows of it; participants are alike, so their order means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Seat {
    /// The journal's word.
    journal: Step,
    /// Each coordinator's word, and the call it waits for (`true`: for the pause after it).
    live: [(Step, Option<(Call, bool)>); 2],
    /// The limits in force are the new ones (beside the old, while preparing an upgrade).
    new: bool,
    /// Fence and stage of the last call that was applied.
    mark: (u8, u8),
    /// Calls that may yet arrive, once or again, by fence and kind.
    sent: [[bool; 3]; FENCES],
}

/// Coordinators after each other, each with a higher fence.
const FENCES: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Live {
    fence: u8,
    phase: Phase,
    wish: Option<Decision>,
    /// What it waits for beside the participants: the decision, or the end.
    decides: Option<Decision>,
    closes: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    /// The tenant's record: fence and phase, and the first decision that was ever seen in it.
    stamp: (u8, Phase),
    first: Option<Decision>,
    seats: Vec<Seat>,
    live: [Option<Live>; 2],
    faults: u8,
}

impl Representative for World {
    fn representative(&self) -> Self {
        let mut same = self.clone();
        same.seats.sort_unstable();
        same
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Act {
    /// A call arrives; `true`: the answer is heard.
    Deliver(usize, u8, Call, bool),
    /// A coordinator's call is answered with no.
    Refuse(usize, usize),
    /// A coordinator's call does not get there.
    Fail(usize, usize),
    /// A coordinator gives up waiting for an answer.
    Lose(usize, usize),
    Retry(usize, usize),
    /// The decision is written; `true`: the answer is heard.
    Decide(usize, bool),
    Close(usize, bool),
    GiveUp(usize),
    Save(usize),
    /// A process begins, in the place of one that ended or beside one that is only slow.
    TakeOver(usize),
}

/// Whether the new limits are above the old ones, and what may go wrong.
struct Trouble {
    seats: usize,
    upgrade: bool,
    fences: u8,
    /// How much may go wrong in one walk; `None` is no end of it.
    faults: Option<u8>,
    /// Whether every state is also followed to its end without further failures.
    calm: bool,
}

impl World {
    fn machine(&self, who: usize) -> State {
        let live = self.live[who].expect("it lives");
        let mut steps = [Step::Absent; SEATS];
        self.seats.iter().zip(&mut steps).for_each(|(seat, step)| *step = seat.live[who].0);
        State { phase: live.phase, steps, wish: live.wish }
    }

    fn feed(&mut self, who: usize, event: Event) {
        let (state, actions) = self.machine(who).on(event);
        self.seats.iter_mut().zip(state.steps).for_each(|(seat, step)| seat.live[who].0 = step);
        let live = self.live[who].as_mut().expect("it lives");
        (live.phase, live.wish) = (state.phase, state.wish);
        let call = |seats: &mut Vec<Seat>, seat: usize, call: Call, fence: u8| {
            seats[seat].live[who].1 = Some((call, false));
            seats[seat].sent[usize::from(fence) - 1][call as usize] = true;
        };
        for action in actions {
            let fence = live.fence;
            match action {
                Action::Prepare(seat) => call(&mut self.seats, seat, Call::Prepare, fence),
                Action::Finish(seat) => call(&mut self.seats, seat, Call::Finish, fence),
                Action::Restore(seat) => call(&mut self.seats, seat, Call::Restore, fence),
                Action::Pause(seat) => self.seats[seat].live[who].1 = Some((Call::Prepare, true)),
                Action::Decide(decision) => live.decides = Some(decision),
                Action::Close => live.closes = true,
            }
        }
        if event == Event::Closed {
            self.leave(who);
        }
    }

    fn leave(&mut self, who: usize) {
        self.live[who] = None;
        self.seats.iter_mut().for_each(|seat| seat.live[who] = (Step::Absent, None));
    }

    fn take_over(&mut self, who: usize) {
        self.stamp.0 += 1;
        let decision = self.stamp.1.decision();
        self.live[who] =
            Some(Live { fence: self.stamp.0, phase: Phase::Preparing, wish: None, decides: None, closes: false });
        for seat in &mut self.seats {
            seat.live[who] = (seat.journal, None);
        }
        let taken = self.machine(who).taken_over();
        self.seats.iter_mut().zip(taken.steps).for_each(|(seat, step)| seat.live[who].0 = step);
        self.feed(who, Event::Begun(decision));
    }

    /// Drops what can't make a difference any more: calls that the participant would not apply, or has applied.
    fn forget(&mut self) {
        for seat in &mut self.seats {
            for fence in 1..=FENCES {
                for call in Call::ALL {
                    if (fence as u8, call.stage()) <= seat.mark {
                        seat.sent[fence - 1][call as usize] = false;
                    }
                }
            }
        }
    }

    /// From here on nothing fails: whether the transition closes, and how.
    fn calm(&self, upgrade: bool) -> bool {
        let mut world = self.clone();
        if world.stamp.1.is_closed() {
            return true;
        }
        (0..2).for_each(|who| world.leave(who));
        world.take_over(0);
        let trouble = Trouble { seats: world.seats.len(), upgrade, fences: 0, faults: None, calm: false };
        for _ in 0..4 * SEATS {
            let Some(live) = world.live[0] else { break };
            let waiting = world.seats.iter().position(|seat| seat.live[0].1.is_some());
            let next = match waiting {
                Some(at) => match world.seats[at].live[0].1 {
                    Some((_, true)) => Act::Retry(0, at),
                    Some((call, false)) => Act::Deliver(at, live.fence, call, true),
                    None => return false,
                },
                None if live.decides.is_some() => Act::Decide(0, true),
                None if live.closes => Act::Close(0, true),
                None => return false,
            };
            match trouble.next_state(&world, next) {
                Some(after) => world = after,
                None => return false,
            }
        }
        let wanted = world.stamp.1.decision() == Some(Decision::Commit);
        world.stamp.1.is_closed() && world.seats.iter().all(|seat| seat.new == wanted)
    }
}

impl Model for Trouble {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        let seat = Seat {
            journal: Step::Untouched,
            live: [(Step::Untouched, None), (Step::Absent, None)],
            new: false,
            mark: (0, 0),
            sent: [[false; 3]; FENCES],
        };
        let first = Live { fence: 1, phase: Phase::Preparing, wish: None, decides: None, closes: false };
        let mut world = World {
            stamp: (1, Phase::Preparing),
            first: None,
            seats: vec![seat; self.seats],
            live: [Some(first), None],
            faults: 0,
        };
        world.feed(0, Event::Begun(None));
        vec![world]
    }

    fn actions(&self, world: &World, acts: &mut Vec<Act>) {
        for (at, seat) in world.seats.iter().enumerate() {
            for fence in 1..=self.fences {
                for call in Call::ALL {
                    let awaited = (0..2).any(|who| {
                        world.live[who].is_some_and(|live| live.fence == fence)
                            && seat.live[who].1 == Some((call, false))
                    });
                    if seat.sent[usize::from(fence) - 1][call as usize] {
                        acts.push(Act::Deliver(at, fence, call, false));
                    }
                    if awaited {
                        acts.push(Act::Deliver(at, fence, call, true));
                    }
                }
            }
            for who in 0..2 {
                match seat.live[who].1 {
                    Some((Call::Prepare, false)) => {
                        acts.extend([Act::Refuse(who, at), Act::Fail(who, at), Act::Lose(who, at)]);
                    }
                    Some((_, false)) => acts.push(Act::Lose(who, at)),
                    Some((_, true)) => acts.push(Act::Retry(who, at)),
                    None => {}
                }
            }
        }
        for who in 0..2 {
            if let Some(live) = world.live[who] {
                if live.decides.is_some() {
                    acts.extend([true, false].map(|heard| Act::Decide(who, heard)));
                }
                if live.closes {
                    acts.extend([true, false].map(|heard| Act::Close(who, heard)));
                }
                if live.phase == Phase::Preparing {
                    acts.push(Act::GiveUp(who));
                }
                acts.push(Act::Save(who));
            }
            if world.stamp.0 < self.fences && !world.stamp.1.is_closed() {
                acts.push(Act::TakeOver(who));
            }
        }
    }

    fn next_state(&self, last: &World, act: Act) -> Option<World> {
        let mut world = last.clone();
        if let Some(most) = self.faults {
            let fault = match act {
                Act::Refuse(..) | Act::Fail(..) | Act::Lose(..) | Act::GiveUp(..) | Act::TakeOver(..) => true,
                Act::Decide(_, heard) | Act::Close(_, heard) => !heard,
                Act::Deliver(..) | Act::Retry(..) | Act::Save(..) => false,
            };
            world.faults += u8::from(fault);
            if world.faults > most {
                return None;
            }
        }
        match act {
            Act::Deliver(at, fence, call, heard) => {
                let seat = &mut world.seats[at];
                let applies = (fence, call.stage()) >= seat.mark;
                if applies {
                    seat.mark = (fence, call.stage());
                    seat.new = match call {
                        // Preparing makes room: only a larger tier needs any.
                        Call::Prepare => self.upgrade,
                        Call::Finish => true,
                        Call::Restore => false,
                    };
                }
                let who = (0..2).find(|who| world.live[*who].is_some_and(|live| live.fence == fence));
                if let Some(who) = who.filter(|_| heard) {
                    let waits = world.seats[at].live[who].1 == Some((call, false));
                    match (applies, call) {
                        (true, Call::Prepare) => {
                            if waits {
                                world.seats[at].live[who].1 = None;
                            }
                            world.feed(who, Event::Prepared(at));
                        }
                        (true, _) => {
                            if waits {
                                world.seats[at].live[who].1 = None;
                            }
                            world.feed(who, Event::Settled(at));
                        }
                        // Somebody newer was here.
                        (false, _) if world.seats[at].mark.0 > fence => world.leave(who),
                        (false, _) => {}
                    }
                }
            }
            Act::Refuse(who, at) | Act::Fail(who, at) => {
                let fence = world.live[who]?.fence;
                let seat = &mut world.seats[at];
                if seat.mark >= (fence, Call::Prepare.stage()) {
                    return None;
                }
                seat.sent[usize::from(fence) - 1][Call::Prepare as usize] = false;
                seat.live[who].1 = None;
                world.feed(who, if matches!(act, Act::Refuse(..)) { Event::Refused(at) } else { Event::Failed(at) });
            }
            Act::Lose(who, at) => {
                world.seats[at].live[who].1 = None;
                world.feed(who, Event::Unknown(at));
                // The pause after it differs in nothing from the time before it was given up.
                if world.seats[at].live[who].1.is_some() {
                    world.seats[at].live[who].1 = None;
                    world.feed(who, Event::Retry(at));
                }
            }
            Act::Retry(who, at) => {
                world.seats[at].live[who].1 = None;
                world.feed(who, Event::Retry(at));
            }
            Act::Decide(who, heard) => {
                let live = world.live[who].as_mut()?;
                let decision = live.decides?;
                if live.fence != world.stamp.0 {
                    if heard {
                        world.leave(who);
                    }
                } else {
                    if world.stamp.1 == Phase::Preparing {
                        world.stamp.1 = if decision == Decision::Commit { Phase::Committed } else { Phase::Aborting };
                    }
                    let written = world.stamp.1.decision()?;
                    world.first = world.first.or(Some(written));
                    if heard {
                        live.decides = None;
                        world.feed(who, Event::Decided(written));
                    }
                }
                if !heard {
                    world.feed(who, Event::Undecided);
                }
            }
            Act::Close(who, heard) => {
                let live = world.live[who].as_mut()?;
                if live.fence != world.stamp.0 {
                    if heard {
                        world.leave(who);
                    }
                } else {
                    world.stamp.1 = match world.stamp.1 {
                        Phase::Committed => Phase::Done,
                        Phase::Aborting => Phase::Aborted,
                        other => other,
                    };
                    if heard {
                        world.feed(who, Event::Closed);
                    }
                }
                if !heard {
                    world.feed(who, Event::Unclosed);
                }
            }
            Act::GiveUp(who) => world.feed(who, Event::GivenUp),
            Act::Save(who) => {
                if world.live[who]?.fence != world.stamp.0 {
                    return None;
                }
                for seat in &mut world.seats {
                    // What a later reader makes of it anyway, so that fewer states differ in nothing.
                    seat.journal = match seat.live[who].0 {
                        Step::Asked | Step::Refused | Step::Untouched => Step::Untouched,
                        step => step,
                    };
                }
            }
            Act::TakeOver(who) => world.take_over(who),
        }
        world.forget();
        (world != *last).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("the decision never changes", |_, world: &World| {
                world.first.is_none() || world.stamp.1.decision() == world.first
            }),
            Property::always("no limit is admitted that a database does not have", |model: &Self, world: &World| {
                let committed = world.stamp.1.decision() == Some(Decision::Commit);
                // Upgrade: new limits are admitted only once every database has them. Downgrade: no database gets
                // smaller before they are no longer admitted.
                match model.upgrade {
                    true => !committed || world.seats.iter().all(|seat| seat.new),
                    false => committed || world.seats.iter().all(|seat| !seat.new),
                }
            }),
            Property::always("closed is settled, for ever", |_, world: &World| match world.stamp.1 {
                Phase::Done => world.seats.iter().all(|seat| seat.new),
                Phase::Aborted => world.seats.iter().all(|seat| !seat.new),
                _ => true,
            }),
            Property::always("once nothing fails it closes as decided", |model: &Self, world: &World| {
                !model.calm || world.stamp.0 as usize >= FENCES || world.calm(model.upgrade)
            }),
            Property::sometimes("it can be done", |_, world: &World| world.stamp.1 == Phase::Done),
            Property::sometimes("it can be aborted", |_, world: &World| world.stamp.1 == Phase::Aborted),
            Property::sometimes("an older coordinator lives beside a newer one", |_, world: &World| {
                world.live.iter().all(Option::is_some)
            }),
        ]
    }
}

/// Walks every state; gives how many there are.
fn check(trouble: Trouble) -> usize {
    let began = std::time::Instant::now();
    let Trouble { seats, upgrade, fences, faults, .. } = trouble;
    let checker = trouble.checker().threads(2).symmetry().spawn_dfs().join();
    println!(
        "{seats} participants, {}, {fences} coordinators, faults {}: {} states, {} distinct, {:?}",
        if upgrade { "upgrade" } else { "downgrade" },
        faults.map_or("without end".into(), |faults| format!("up to {faults}")),
        checker.state_count(),
        checker.unique_state_count(),
        began.elapsed()
    );
    checker.assert_properties();
    checker.unique_state_count()
}

#[test]
fn no_failure_splits_a_transition() {
    for upgrade in [true, false] {
        assert!(check(Trouble { seats: 1, upgrade, fences: 3, faults: None, calm: true }) > 5_000);
        assert!(check(Trouble { seats: 2, upgrade, fences: 2, faults: None, calm: false }) > 50_000);
    }
}

#[test]
fn no_failure_splits_a_transition_of_five() {
    assert!(check(Trouble { seats: 5, upgrade: true, fences: 2, faults: Some(1), calm: false }) > 10_000);
    assert!(check(Trouble { seats: 5, upgrade: false, fences: 2, faults: Some(1), calm: false }) > 10_000);
}

/// More of the same, for `make chaos`: minutes.
#[test]
#[ignore = "minutes: `make chaos` runs it"]
fn no_two_failures_split_a_transition_of_five() {
    for upgrade in [true, false] {
        check(Trouble { seats: 5, upgrade, fences: 2, faults: Some(2), calm: false });
        check(Trouble { seats: 2, upgrade, fences: 3, faults: None, calm: true });
        check(Trouble { seats: 3, upgrade, fences: 2, faults: None, calm: false });
    }
}
