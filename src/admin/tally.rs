//! Adds the meters up, by tier and for the organisations with the most traffic.
//!
//! A tenant changes its tier and meters come and go, but a counter may only grow. So what is added up is not the
//! meters but what they have gained since the last look, under the labels of that moment. An organisation that loses
//! its label takes its sums with it: folding them into the rest would look like a burst of traffic there.

use std::{
    cmp::Reverse,
    fmt::Display,
    sync::{Arc, atomic::Ordering},
};

use hashbrown::{HashMap, HashSet};

use super::text::{Kind, Text};
use crate::{
    quota::Slot,
    tenant::{OrgId, Protocol, Tier},
    usage::{Meter, Meters},
};

/// Counters of a meter, in the order of [`SERIES`].
type Counts = [u64; 8];

/// One counter as it is exported: name after `dynabase_`, help, divisor to its base unit.
const SERIES: [(&str, &str, u64); 8] = [
    ("sessions_opened_total", "Sessions admitted.", 1),
    ("requests_total", "Statements or commands answered.", 1),
    ("transactions_total", "Transactions or batches that took an upstream connection.", 1),
    ("received_bytes_total", "Bytes from clients.", 1),
    ("sent_bytes_total", "Bytes to clients.", 1),
    ("request_errors_total", "Errors that upstreams reported.", 1),
    ("requests_refused_total", "Requests refused by a limit or rule.", 1),
    ("upstream_wait_seconds_total", "Time that requests waited for an upstream connection.", 1_000_000),
];

/// Which of [`SERIES`] are exported per organisation: requests, bytes, refusals.
const PER_ORG: [usize; 4] = [1, 3, 4, 6];

const RECEIVED: usize = 3;
const SENT: usize = 4;

/// An organisation with a label loses it only to one with so many times its traffic, or labels would flap.
const INCUMBENT: u64 = 2;

/// The label of all organisations without one. No organisation of that name has a label of its own.
const OTHER: &str = "other";

const PROTOCOLS: usize = Protocol::ALL.len();
const TIERS: usize = Tier::ALL.len();

fn read(meter: &Meter) -> Counts {
    [
        &meter.opened,
        &meter.requests,
        &meter.transactions,
        &meter.bytes_in,
        &meter.bytes_out,
        &meter.errors,
        &meter.refused,
        &meter.waited_us,
    ]
    .map(|counter| counter.load(Ordering::Relaxed))
}

fn add(sum: &mut Counts, gained: &Counts) {
    sum.iter_mut().zip(gained).for_each(|(sum, gained)| *sum = sum.wrapping_add(*gained));
}

/// Name, help, value.
type Gauge = (&'static str, &'static str, fn(&Slot, Protocol) -> u32);

#[derive(Clone, Copy)]
struct Seen {
    counts: Counts,
    tier: Tier,
}

/// The sums so far.
pub(super) struct Tally {
    labels_max: usize,
    seen: HashMap<(OrgId, Protocol), Seen>,
    by_tier: [[Counts; TIERS]; PROTOCOLS],
    /// Bytes, fading: what decides who has a label.
    traffic: HashMap<OrgId, u64>,
    labelled: HashMap<OrgId, [Counts; PROTOCOLS]>,
    other: [Counts; PROTOCOLS],
}

impl Tally {
    /// Nothing added up yet; at most `labels_max` organisations get a label.
    pub(super) fn new(labels_max: usize) -> Self {
        Self {
            labels_max,
            seen: HashMap::new(),
            by_tier: Default::default(),
            traffic: HashMap::new(),
            labelled: HashMap::new(),
            other: Default::default(),
        }
    }

    /// Adds what every meter has gained.
    pub(super) fn settle(&mut self, meters: &Meters, slots: &[Arc<Slot>]) {
        let tiers: HashMap<&OrgId, Tier> = slots.iter().map(|slot| (slot.org(), slot.policy().tenant.tier)).collect();
        let gained: Vec<_> = meters
            .all()
            .into_iter()
            .filter_map(|(org, protocol, meter)| {
                let tier = tiers.get(&org).copied();
                let gained = self.gain(&org, protocol, &meter, tier)?;
                Some((org, protocol, gained))
            })
            .collect();
        self.rank();
        for (org, protocol, gained) in gained {
            self.book(&org, protocol, &gained);
        }
    }

    /// Takes the last counts of meters that are gone ([`Meters::sweep`]), and fades the traffic of the past.
    pub(super) fn retire(&mut self, swept: Vec<(OrgId, Protocol, Arc<Meter>)>) {
        for (org, protocol, meter) in swept {
            if let Some(gained) = self.gain(&org, protocol, &meter, None) {
                self.book(&org, protocol, &gained);
            }
            self.seen.remove(&(org, protocol));
        }
        self.traffic.retain(|_, bytes| {
            *bytes /= 2;
            *bytes > 0
        });
    }

    /// What a meter has gained since the last look, added to its tier: the present one, or the last one known.
    fn gain(&mut self, org: &OrgId, protocol: Protocol, meter: &Meter, tier: Option<Tier>) -> Option<Counts> {
        let counts = read(meter);
        let fresh = Seen { counts: Counts::default(), tier: tier.unwrap_or(Tier::Free) };
        let seen = self.seen.entry((org.clone(), protocol)).or_insert(fresh);
        seen.tier = tier.unwrap_or(seen.tier);
        let mut gained = counts;
        // One that counts less than before is another meter, in the place of one that is gone: all it has is new.
        if counts.iter().zip(seen.counts).all(|(now, before)| *now >= before) {
            gained.iter_mut().zip(seen.counts).for_each(|(now, before)| *now -= before);
        }
        seen.counts = counts;
        if gained == Counts::default() {
            return None;
        }
        add(&mut self.by_tier[protocol as usize][seen.tier as usize], &gained);
        *self.traffic.entry(org.clone()).or_default() += gained[RECEIVED] + gained[SENT];
        Some(gained)
    }

    fn book(&mut self, org: &OrgId, protocol: Protocol, gained: &Counts) {
        let sums = self.labelled.get_mut(org).unwrap_or(&mut self.other);
        add(&mut sums[protocol as usize], gained);
    }

    /// Decides anew who has a label.
    fn rank(&mut self) {
        let mut orgs: Vec<(u64, &OrgId)> = self
            .traffic
            .iter()
            .filter(|(org, _)| org.as_str() != OTHER)
            .map(|(org, bytes)| {
                let weight = if self.labelled.contains_key(org) { INCUMBENT } else { 1 };
                (bytes.saturating_mul(weight), org)
            })
            .collect();
        if orgs.len() > self.labels_max {
            orgs.select_nth_unstable_by_key(self.labels_max, |(bytes, org)| (Reverse(*bytes), (*org).clone()));
            orgs.truncate(self.labels_max);
        }
        let top: HashSet<OrgId> = orgs.into_iter().map(|(_, org)| org.clone()).collect();
        self.labelled.retain(|org, _| top.contains(org));
        for org in top {
            self.labelled.entry(org).or_default();
        }
    }

    /// Writes the sums, and what the labelled organisations use now.
    pub(super) fn write(&self, text: &mut Text, slots: &[Arc<Slot>]) {
        for (at, (name, help, divisor)) in SERIES.into_iter().enumerate() {
            let name = format!("dynabase_{name}");
            text.family(&name, Kind::Counter, help);
            for protocol in Protocol::ALL {
                for tier in Tier::ALL {
                    let count = self.by_tier[protocol as usize][tier as usize][at];
                    let labels: [(&str, &dyn Display); 2] = [("protocol", &protocol.label()), ("tier", &tier)];
                    text.sample(&name, &labels, in_base_unit(count, divisor));
                }
            }
        }
        for at in PER_ORG {
            let (name, help, divisor) = SERIES[at];
            let name = format!("dynabase_org_{name}");
            let help = format!("{help} For the organisations with the most traffic; \"other\" is the rest.");
            text.family(&name, Kind::Counter, &help);
            self.each_org(|org, protocol, counts| {
                let labels: [(&str, &dyn Display); 2] = [("org", &org), ("protocol", &protocol.label())];
                text.sample(&name, &labels, in_base_unit(counts[at], divisor));
            });
        }
        self.write_use(text, slots);
    }

    fn write_use(&self, text: &mut Text, slots: &[Arc<Slot>]) {
        let gauges: [Gauge; 2] = [
            ("dynabase_org_sessions", "Sessions open, by organisation.", |slot, protocol| slot.clients(protocol)),
            ("dynabase_org_upstream_connections", "Upstream connections in use, by organisation.", |slot, protocol| {
                slot.connections(protocol)
            }),
        ];
        for (name, help, value) in gauges {
            text.family(name, Kind::Gauge, help);
            for protocol in Protocol::ALL {
                let mut other = 0u64;
                for slot in slots {
                    let value = value(slot, protocol);
                    if self.labelled.contains_key(slot.org()) {
                        text.sample(name, &[("org", slot.org()), ("protocol", &protocol.label())], value);
                    } else {
                        other += u64::from(value);
                    }
                }
                text.sample(name, &[("org", &OTHER), ("protocol", &protocol.label())], other);
            }
        }
    }

    fn each_org(&self, mut visit: impl FnMut(&str, Protocol, &Counts)) {
        let all = self.labelled.iter().map(|(org, counts)| (org.as_str(), counts)).chain([(OTHER, &self.other)]);
        for (org, counts) in all {
            Protocol::ALL.into_iter().for_each(|protocol| visit(org, protocol, &counts[protocol as usize]));
        }
    }
}

/// Whole units stay integers, so that no count loses digits.
fn in_base_unit(count: u64, divisor: u64) -> String {
    match divisor {
        1 => count.to_string(),
        divisor => format!("{}.{:06}", count / divisor, count % divisor * 1_000_000 / divisor),
    }
}
