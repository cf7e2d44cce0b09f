//! `/metrics`: rare events from the recorder, and what is read when scraped: table, meters, process.

use std::{fmt::Display, sync::Arc, time::UNIX_EPOCH};

use super::{
    State,
    tally::Tally,
    text::{Kind, Text},
};
use crate::{
    quota::Slot,
    tenant::{Protocol, Tier},
};

const PROTOCOLS: usize = Protocol::ALL.len();
const TIERS: usize = Tier::ALL.len();

/// Ticks of `/proc/self/stat` per second: a constant of Linux' interface (`USER_HZ`), not of the machine.
const TICKS_PER_SECOND: u64 = 100;

/// Everything as Prometheus text.
pub(super) fn render(state: &State, tally: &mut Tally, draining: bool) -> String {
    let slots = state.table.slots();
    tally.settle(&state.meters, &slots);
    let mut text = Text(state.recorder.render());
    write_state(&mut text, state, draining);
    write_slots(&mut text, &slots);
    tally.write(&mut text, &slots);
    write_process(&mut text, state);
    text.0
}

fn write_state(text: &mut Text, state: &State, draining: bool) {
    text.family("dynabase_build_info", Kind::Gauge, "Version of this process; always 1.");
    text.sample("dynabase_build_info", &[("version", &env!("CARGO_PKG_VERSION"))], 1);
    let ready = u8::from(state.not_ready(draining).is_empty());
    text.single("dynabase_ready", Kind::Gauge, "1 if /readyz says so.", ready);
    text.single("dynabase_draining", Kind::Gauge, "1 while the process is shutting down.", u8::from(draining));
    if let Some(limits) = state.connections.get() {
        text.single("dynabase_connections", Kind::Gauge, "Client connections open.", limits.connections());
        let help = "Client connections that this process accepts at once.";
        text.single("dynabase_connections_max", Kind::Gauge, help, limits.connections_max());
    }
    if let Some(age) = state.catalog_age.get().and_then(|age| age()) {
        let help = "Time since the catalog was last known to be in step with its source.";
        text.single("dynabase_catalog_age_seconds", Kind::Gauge, help, age.as_secs_f64());
    }
}

#[derive(Clone, Copy, Default)]
struct Use {
    sessions: u64,
    connections: u64,
    connections_max: u64,
    stored: u64,
}

/// Name, help, value.
type Gauge = (&'static str, &'static str, fn(&Use) -> u64);

fn write_slots(text: &mut Text, slots: &[Arc<Slot>]) {
    let mut resident = [0u64; TIERS];
    let mut uses = [[Use::default(); TIERS]; PROTOCOLS];
    for slot in slots {
        let policy = slot.policy();
        let tier = policy.tenant.tier as usize;
        resident[tier] += 1;
        for protocol in Protocol::ALL {
            let sum = &mut uses[protocol as usize][tier];
            sum.sessions += u64::from(slot.clients(protocol));
            sum.connections += u64::from(slot.connections(protocol));
            sum.connections_max += u64::from(policy.limits.connections(protocol));
            sum.stored = sum.stored.saturating_add(slot.stored(protocol));
        }
    }
    text.family("dynabase_tenants_resident", Kind::Gauge, "Tenants in memory.");
    for tier in Tier::ALL {
        text.sample("dynabase_tenants_resident", &[("tier", &tier)], resident[tier as usize]);
    }
    let gauges: [Gauge; 4] = [
        ("dynabase_sessions", "Sessions open.", |sum| sum.sessions),
        ("dynabase_upstream_connections", "Upstream connections in use by tenants.", |sum| sum.connections),
        ("dynabase_upstream_connections_max", "Upstream connections that resident tenants may use.", |sum| {
            sum.connections_max
        }),
        ("dynabase_stored_bytes", "Bytes stored by resident tenants, as last sampled.", |sum| sum.stored),
    ];
    for (name, help, value) in gauges {
        text.family(name, Kind::Gauge, help);
        for protocol in Protocol::ALL {
            for tier in Tier::ALL {
                let labels: [(&str, &dyn Display); 2] = [("protocol", &protocol.label()), ("tier", &tier)];
                text.sample(name, &labels, value(&uses[protocol as usize][tier as usize]));
            }
        }
    }
}

/// The process as every Prometheus client library describes it; nothing where there is no `/proc`.
fn write_process(text: &mut Text, state: &State) {
    let started = state.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    text.single("process_start_time_seconds", Kind::Gauge, "Start of the process, Unix time.", started);
    if let Some(bytes) = resident_bytes() {
        text.single("process_resident_memory_bytes", Kind::Gauge, "Memory in use.", bytes);
    }
    if let Some(ticks) = cpu_ticks() {
        let seconds = format!("{}.{:02}", ticks / TICKS_PER_SECOND, ticks % TICKS_PER_SECOND);
        text.single("process_cpu_seconds_total", Kind::Counter, "Processor time, user and system.", seconds);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        text.single("process_open_fds", Kind::Gauge, "Open file descriptors.", open.count());
    }
}

fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib: u64 =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}

fn cpu_ticks() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // Behind the program's name, which may hold anything: state is field 3, user and system time are 14 and 15.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}
