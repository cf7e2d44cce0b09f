//! The lock-free files of `src/quota`, compiled as they are against loom's atomics, in every interleaving of two or
//! three threads. Cut the checks they make and these go red.

use std::{
    sync::Arc,
    task::{Context, Wake, Waker},
    time::Duration,
};

use loom::{
    sync::{
        Mutex, Notify,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};
use quota::{
    live::{Live, Stop},
    permit::{Permit, Place},
    rate::{Pace, Rate},
};

// The models use a part of what the files offer.
#[allow(dead_code)]
#[path = "../src/quota"]
mod quota {
    pub mod live;
    pub mod permit;
    pub mod rate;

    mod atomic {
        pub(super) use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};

        /// Stores by swapping: loom may order another thread's read-modify-write behind a plain store that it did not
        /// read, where the language says that nothing comes between what such an operation reads and writes.
        #[derive(Debug)]
        pub struct AtomicU64(loom::sync::atomic::AtomicU64);

        impl AtomicU64 {
            pub(super) fn new(value: u64) -> Self {
                Self(loom::sync::atomic::AtomicU64::new(value))
            }

            pub(super) fn store(&self, value: u64, order: Ordering) {
                self.0.swap(value, order);
            }
        }

        impl std::ops::Deref for AtomicU64 {
            type Target = loom::sync::atomic::AtomicU64;

            fn deref(&self) -> &Self::Target {
                &self.0
            }
        }

        /// What `atomic_waker` promises: a wake that follows a registration reaches it.
        #[derive(Debug)]
        pub(super) struct AtomicWaker(loom::sync::Mutex<Option<std::task::Waker>>);

        impl AtomicWaker {
            pub(super) fn new() -> Self {
                Self(loom::sync::Mutex::new(None))
            }

            pub(super) fn register(&self, waker: &std::task::Waker) {
                *self.0.lock().expect("loom poisons nothing") = Some(waker.clone());
            }

            pub(super) fn wake(&self) {
                let waker = self.0.lock().expect("loom poisons nothing").take();
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
        }
    }
}

mod tenant {
    pub mod directory {
        pub type KeyHash = [u8; 32];
    }
}

/// Every interleaving with up to three preemptions; more find nothing here that three do not, and take hours.
fn model(run: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(run);
}

fn session() -> Live {
    Live::new(1, 1, u64::MAX, None, None)
}

struct Places {
    place: Place,
    cap: AtomicU32,
    held: AtomicU32,
}

/// Takes a place if there is one, and checks how many hold one at that instant.
fn hold(places: &Arc<Places>) -> Option<Permit<Places>> {
    let cap = places.cap.load(Ordering::Relaxed);
    let permit = Permit::take(places, |places| &places.place, cap)?;
    let held = places.held.fetch_add(1, Ordering::Relaxed) + 1;
    assert!(held <= 2, "{held} hold one of two places");
    Some(permit)
}

fn give(places: &Places, permit: Permit<Places>) {
    places.held.fetch_sub(1, Ordering::Relaxed);
    drop(permit);
}

#[test]
fn places_are_neither_exceeded_nor_lost_while_the_cap_shrinks() {
    model(|| {
        let places = Arc::new(Places { place: Place::default(), cap: AtomicU32::new(2), held: AtomicU32::new(0) });
        let first = hold(&places).expect("the first of two");
        let acquire = |places: &Arc<Places>| {
            let places = Arc::clone(places);
            thread::spawn(move || {
                if let Some(permit) = hold(&places) {
                    give(&places, permit);
                }
            })
        };
        let threads = [acquire(&places), acquire(&places)];
        let releaser = {
            let places = Arc::clone(&places);
            thread::spawn(move || give(&places, first))
        };
        places.cap.store(1, Ordering::Relaxed);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        releaser.join().unwrap();
        assert_eq!(places.place.taken(), 0, "every place came back");
        let last = hold(&places).expect("the place under the new cap");
        assert!(hold(&places).is_none(), "the new cap holds");
        give(&places, last);
    });
}

#[test]
fn nobody_is_refused_because_somebody_else_was() {
    model(|| {
        let place = Arc::new(Place::default());
        assert!(place.take(2));
        let refused = {
            let place = Arc::clone(&place);
            thread::spawn(move || assert!(!place.take(1)))
        };
        assert!(place.take(2), "a refused attempt shows as a taken place");
        refused.join().unwrap();
    });
}

#[test]
fn what_the_last_holder_did_is_seen_by_the_next() {
    model(|| {
        let shared = Arc::new((Place::default(), AtomicU32::new(0)));
        assert!(shared.0.take(1));
        let holder = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                shared.1.store(1, Ordering::Relaxed);
                shared.0.give();
            })
        };
        if shared.0.take(1) {
            assert_eq!(shared.1.load(Ordering::Relaxed), 1);
        }
        holder.join().unwrap();
    });
}

#[test]
fn concurrent_decisions_stay_within_the_burst_and_lose_no_update() {
    model(|| {
        const NOW: u64 = 100;
        let pace = Pace { interval_ns: 10, tolerance_ns: 20 };
        let rate = Arc::new(Rate::default());
        let admit = |units| {
            let rate = Arc::clone(&rate);
            thread::spawn(move || if rate.admit(NOW, units, pace).is_ok() { units } else { 0 })
        };
        let (one, two) = (admit(1), admit(2));
        rate.charge(NOW, 1, pace);
        let charged = 1;
        let admitted = one.join().unwrap() + two.join().unwrap();
        assert!(admitted <= 2, "a burst is 2, admitted {admitted}");
        assert_eq!(rate.owed(NOW), Duration::from_nanos(10 * (admitted + charged)), "an update was lost");
    });
}

#[test]
fn an_upgrade_forgives_once_and_loses_no_later_decision() {
    model(|| {
        const NOW: u64 = 100;
        let slow = Pace { interval_ns: 1000, tolerance_ns: 1000 };
        let fast = Pace { interval_ns: 10, tolerance_ns: 20 };
        let rate = Arc::new(Rate::default());
        rate.charge(NOW, 3, slow);
        let upgrade = {
            let rate = Arc::clone(&rate);
            thread::spawn(move || rate.forgive(NOW, fast))
        };
        let admitted = rate.admit(NOW, 1, fast).is_ok();
        upgrade.join().unwrap();
        assert!(!admitted, "a whole burst is still owed");
        assert_eq!(rate.owed(NOW), Duration::from_nanos(20));
        assert!(rate.admit(NOW + 10, 1, fast).is_ok(), "the upgrade acts at once");
    });
}

#[test]
fn the_first_reason_to_stop_stays() {
    model(|| {
        let live = Arc::new(session());
        let stop = |reason| {
            let live = Arc::clone(&live);
            thread::spawn(move || {
                live.stop(reason);
                live.stopped().expect("it is stopping")
            })
        };
        let threads = [stop(Stop::Suspended), stop(Stop::Expired)];
        let early = live.stopped();
        let seen = threads.map(|thread| thread.join().unwrap());
        let last = live.stopped().expect("it is stopping");
        assert_eq!(seen, [last, last]);
        assert!(early.is_none_or(|early| early == last));
    });
}

#[test]
fn a_new_deadline_is_neither_lost_to_a_tick_nor_blamed_for_the_old_one() {
    model(|| {
        let live = Arc::new(session());
        live.set_deadline(10);
        let ticker = {
            let live = Arc::clone(&live);
            thread::spawn(move || live.tick(10))
        };
        live.set_deadline(20);
        assert!(!live.take_due(), "the old deadline's news came with the new one");
        ticker.join().unwrap();
        assert!(!live.take_due(), "the old deadline's news came late");
        live.tick(19);
        assert!(!live.take_due());
        live.tick(20);
        assert!(live.take_due(), "the new deadline was lost");
        live.tick(30);
        assert!(!live.take_due(), "news comes once");
    });
}

#[test]
fn a_deadline_is_reported_once_whenever_it_is_asked_for() {
    model(|| {
        let live = Arc::new(session());
        live.set_deadline(10);
        let ticker = {
            let live = Arc::clone(&live);
            thread::spawn(move || live.tick(10))
        };
        let early = live.take_due();
        ticker.join().unwrap();
        let late = live.take_due();
        assert!(early ^ late, "early {early}, late {late}");
    });
}

struct Bell(Notify);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.notify();
    }
}

/// Sleeps as a session's task does, until something is signalled. A lost wake-up is a deadlock, which loom reports.
fn sleep_until_signalled(live: &Live) {
    let bell = Arc::new(Bell(Notify::new()));
    let waker = Waker::from(Arc::clone(&bell));
    loop {
        live.register(&Context::from_waker(&waker));
        if live.signalled() {
            return;
        }
        bell.0.wait();
    }
}

#[test]
fn a_sleeping_session_hears_every_signal() {
    let signals: [fn(&Live); 3] = [|live| live.stop(Stop::Shed), Live::cancel, |live| live.tick(10)];
    for signal in signals {
        model(move || {
            let live = Arc::new(session());
            live.set_deadline(10);
            let signaller = {
                let live = Arc::clone(&live);
                thread::spawn(move || signal(&live))
            };
            sleep_until_signalled(&live);
            signaller.join().unwrap();
            let heard = [live.stopped().is_some(), live.take_cancel(), live.take_due()];
            assert_eq!(heard.into_iter().filter(|&heard| heard).count(), 1);
        });
    }
}

/// The protocol of `Slot::enter` and `Slot::change` with `Gate::admit` (check, enter, check again): the policy is
/// swapped under the lock of the sessions. Relaxed accesses, so that only the lock orders them.
#[test]
fn no_session_slips_into_a_suspended_tenant() {
    model(|| {
        const SUSPENDED: u32 = 1;
        let slot = Arc::new((AtomicU32::new(0), Mutex::new(Vec::<Arc<Live>>::new())));
        let suspend = {
            let slot = Arc::clone(&slot);
            thread::spawn(move || {
                let sessions = slot.1.lock().unwrap();
                slot.0.store(SUSPENDED, Ordering::Relaxed);
                sessions.iter().for_each(|live| live.stop(Stop::Suspended));
            })
        };
        let live = Arc::new(session());
        let welcome = slot.0.load(Ordering::Relaxed) != SUSPENDED && {
            slot.1.lock().unwrap().push(Arc::clone(&live));
            slot.0.load(Ordering::Relaxed) != SUSPENDED
        };
        suspend.join().unwrap();
        assert!(!welcome || live.stopped() == Some(Stop::Suspended), "admitted and never told");
    });
}
