//! The rate against a model that is too simple to be wrong, with numbers too large to overflow.

use std::time::Duration;

use proptest::prelude::*;

use super::rate::{DEBT_MAX, Pace, Present, Rate, UNITS_MAX};

/// A leaking bucket: what is owed shrinks by one nanosecond each nanosecond.
#[derive(Default)]
struct Model {
    at: i128,
    owed: i128,
}

impl Model {
    fn leak(&mut self, now: u64) {
        let now = i128::from(now);
        self.owed = (self.owed - (now - self.at)).max(0);
        self.at = now;
    }

    /// The wait, 0 when admitted.
    fn admit(&mut self, now: u64, units: u64, pace: Pace) -> i128 {
        self.leak(now);
        let cost = i128::from(units.min(UNITS_MAX)) * i128::from(pace.interval_ns);
        let tolerance = i128::from(pace.tolerance_ns);
        if self.owed == 0 || self.owed + cost <= tolerance {
            self.owed += cost;
            return 0;
        }
        (self.owed + cost - tolerance).min(self.owed)
    }

    fn charge(&mut self, now: u64, units: u64, pace: Pace) {
        self.leak(now);
        let cost = i128::from(units.min(UNITS_MAX)) * i128::from(pace.interval_ns);
        let furthest = i128::from(pace.tolerance_ns) + DEBT_MAX.as_nanos() as i128;
        self.owed = (self.owed + cost).min(furthest.max(self.owed));
    }
}

#[derive(Clone, Debug)]
enum Act {
    Pass(u64),
    Admit(u64),
    Charge(u64),
    Upgrade(Pace),
    Downgrade(Pace),
}

fn pace() -> impl Strategy<Value = Pace> {
    let interval_ns = prop_oneof![Just(1u64), 50_000..=4_000_000_000u64, Just(u64::MAX)];
    let burst = prop_oneof![1..=10u32, 1..=40_000u32, Just(u32::MAX)];
    (interval_ns, burst).prop_map(|(interval_ns, burst)| Pace::new(interval_ns, burst))
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => prop_oneof![0..1_000u64, 0..3_000_000_000u64, 0..200_000_000_000u64].prop_map(Act::Pass),
        6 => prop_oneof![Just(1u64), 0..50u64, 0..=u64::MAX].prop_map(Act::Admit),
        2 => prop_oneof![0..50u64, 0..=u64::MAX].prop_map(Act::Charge),
        1 => pace().prop_map(Act::Upgrade),
        1 => pace().prop_map(Act::Downgrade),
    ]
}

proptest! {
    #[test]
    fn every_decision_and_every_wait_is_the_models(start in pace(), acts in prop::collection::vec(act(), 1..200)) {
        let (rate, mut model, mut pace, mut now) = (Rate::default(), Model::default(), start, 1u64);
        for act in acts {
            match act {
                Act::Pass(ns) => now += ns,
                Act::Admit(units) => {
                    let wait = rate.admit(now, units, pace).err().unwrap_or_default();
                    prop_assert_eq!(wait.as_nanos() as i128, model.admit(now, units, pace));
                }
                Act::Charge(units) => {
                    rate.charge(now, units, pace);
                    model.charge(now, units, pace);
                }
                Act::Upgrade(next) => {
                    pace = next;
                    rate.forgive(now, pace);
                    model.leak(now);
                    model.owed = model.owed.min(i128::from(pace.tolerance_ns));
                }
                Act::Downgrade(next) => pace = next,
            }
            model.leak(now);
            prop_assert_eq!(rate.owed(now).as_nanos() as i128, model.owed);
        }
    }

    #[test]
    fn no_window_holds_more_than_burst_and_rate(
        interval_ns in 200_000..4_000_000_000u64,
        burst in 1..200u32,
        asks in prop::collection::vec((0..20_000_000u64, 1..=20u64), 1..150),
    ) {
        let (rate, pace) = (Rate::default(), Pace::new(interval_ns, burst));
        let mut now = 1;
        let mut admitted: Vec<(u64, u64)> = Vec::new();
        for (pause, units) in asks {
            now += pause;
            let units = units.min(u64::from(burst));
            if rate.admit(now, units, pace).is_ok() {
                admitted.push((now, units * pace.interval_ns));
            }
        }
        for (i, &(from, _)) in admitted.iter().enumerate() {
            let mut cost = 0;
            for &(to, units) in &admitted[i..] {
                cost += units;
                prop_assert!(cost <= pace.tolerance_ns + (to - from));
            }
        }
    }

    #[test]
    fn a_wait_is_exactly_long_enough(pace in pace(), asks in prop::collection::vec(1..50u64, 1..40), last in 1..500u64) {
        let rate = Rate::default();
        for units in asks {
            let _ = rate.admit(1, units, pace);
        }
        if let Err(wait) = rate.admit(1, last, pace) {
            let at = 1 + u64::try_from(wait.as_nanos()).unwrap();
            prop_assert!(rate.admit(at - 1, last, pace).is_err());
            prop_assert!(rate.admit(at, last, pace).is_ok());
        }
    }

    #[test]
    fn a_pace_fits_one_word(from in any::<(u64, u32)>(), to in any::<(u64, u32)>()) {
        let present = Present::new(from.0, from.1);
        prop_assert_eq!(present.pace(), Pace::new(from.0, from.1));
        present.set(to.0, to.1);
        prop_assert_eq!(present.pace(), Pace::new(to.0, to.1));
    }

    /// Two cores may read the coarse clock in one order and decide in the other.
    #[test]
    fn a_clock_that_steps_back_admits_nothing_extra(steps in prop::collection::vec(0..1_000_000u64, 1..100)) {
        let (rate, pace) = (Rate::default(), Pace::new(1_000_000, 10));
        let latest = *steps.iter().max().unwrap();
        let admitted = steps.iter().filter(|&&step| rate.admit(1 + step, 1, pace).is_ok()).count() as u64;
        prop_assert!((admitted - 1) * pace.interval_ns <= pace.tolerance_ns + latest);
    }
}

#[test]
fn a_debt_is_bounded() {
    let (rate, pace) = (Rate::default(), Pace::new(1_000_000_000, 1));
    for _ in 0..3 {
        rate.charge(1, u64::MAX, pace);
        assert_eq!(rate.owed(1), DEBT_MAX + Duration::from_secs(1));
    }
}

#[test]
fn an_upgrade_acts_at_once() {
    let (rate, slow, fast) = (Rate::default(), Pace::new(1_000_000_000, 100), Pace::new(1_000_000, 100));
    rate.admit(1, 100, slow).unwrap();
    rate.forgive(1, fast);
    assert_eq!(rate.admit(1, 1, fast), Err(Duration::from_millis(1)));
    rate.admit(1_000_001, 1, fast).unwrap();
}
