//! Commands that a node of a cluster has not run because their slot is elsewhere, run again where the cluster says. The
//! link waits meanwhile: replies stay in order, and a command is never run twice, since `MOVED` and `ASK` mean that it
//! was not run at all.
//!
//! A reply can hold words that a tenant chose, so none is believed: it makes us ask the nodes that we know
//! ([`Nodes::elsewhere`](super::nodes::Nodes::elsewhere)), and nobody is dialled, let alone told a password, whom they
//! don't name.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Weak},
    time::Duration,
};

use super::{
    MOVING_PAUSE, Place, Version,
    dial::{self, DialError},
    nodes,
};

/// Longest time for one of them, connecting included.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How often one may be sent elsewhere.
const HOPS_MAX: usize = 5;

/// What a group of requests needs to be sent again: one command, or one transaction.
#[derive(Debug)]
pub struct Group {
    /// The requests.
    pub bytes: Box<[u8]>,
    /// How many replies they bring.
    pub frames: usize,
}

/// Where a node says that a slot is.
#[derive(Clone, Debug)]
pub struct Elsewhere {
    /// For this time only (`ASK`).
    pub once: bool,
    /// The slot.
    pub slot: u16,
    /// The address that it names: a claim, not a place to go to.
    pub address: Arc<str>,
    /// Who said so.
    pub here: Arc<str>,
}

impl Elsewhere {
    /// Reads an error of the node `here`, which leaves its own host out. About any other slot than `own` nobody was
    /// asked: such words are somebody's text.
    pub fn parse(error: &[u8], here: &Arc<str>, own: u16) -> Option<Self> {
        let (once, slot, place) = nodes::redirection(error)?;
        if slot != own {
            return None;
        }
        let address = match place.strip_prefix(':') {
            Some(port) => format!("{}:{port}", here.rsplit_once(':').map_or(&**here, |(host, _)| host)).into(),
            None => place.into(),
        };
        Some(Self { once, slot, address, here: Arc::clone(here) })
    }
}

/// A group that is being run elsewhere.
pub type Running = Pin<Box<dyn Future<Output = Result<Vec<Vec<u8>>, DialError>> + Send>>;

/// Runs `group` where `to` says. `loads` are requests with this many replies that load the scripts it may call.
pub fn run(place: Weak<Place>, version: Version, to: Elsewhere, loads: (Vec<u8>, usize), group: Group) -> Running {
    Box::pin(async move {
        let run = visit(place, version, to, loads, group);
        tokio::time::timeout(TIMEOUT, run).await.unwrap_or(Err(DialError::Slow))
    })
}

async fn visit(
    place: Weak<Place>,
    version: Version,
    mut to: Elsewhere,
    (loads, loaded): (Vec<u8>, usize),
    group: Group,
) -> Result<Vec<Vec<u8>>, DialError> {
    for hop in 0..HOPS_MAX {
        if hop > 0 {
            tokio::time::sleep(MOVING_PAUSE).await;
        }
        let Some(place) = place.upgrade() else { return Err(DialError::Slow) };
        let address = place.upstream.nodes.elsewhere(&to).await?;
        let mut stream = place.visit(&address, version).await?;
        let mut requests = loads.clone();
        let mut ours = loaded;
        if to.once {
            requests.extend_from_slice(b"*1\r\n$6\r\nASKING\r\n");
            ours += 1;
        }
        requests.extend_from_slice(&group.bytes);
        let mut answers = dial::exchange(&mut stream, &requests, ours + group.frames).await?;
        answers.drain(..ours);
        match answers.iter().find_map(|answer| Elsewhere::parse(answer, &address, to.slot)) {
            Some(next) => to = next,
            None => return Ok(answers),
        }
    }
    Err(DialError::Refused("a command was sent elsewhere too often".to_owned()))
}
