//! Which server answers for a tenant now: the one that is configured, the master that Sentinel names, or the node of
//! a cluster that owns the tenant's slot.
//!
//! ```text
//!   address(slot) ── known? ──▶ address
//!                └─ ask: Sentinel "get-master-addr-by-name" · any node "CLUSTER SLOTS"
//!   a connection fails, a server says READONLY or MOVED ──▶ failed / moved ──▶ asked again
//!   once a second: asked anyway; a change reaches every connection through `watch`
//! ```
//!
//! What was known stays known while nobody answers: a lost Sentinel or node takes nothing away from a working server.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

use super::{
    Target,
    dial::{self, CONNECT_TIMEOUT, DialError},
};
use crate::{
    tenant::namespace::Password,
    wire::resp::{Cursor, Item, put_request},
};

/// Slots of a cluster.
const SLOTS: u16 = 16_384;

/// How often Sentinel or the cluster is asked while nothing fails.
const LOOK: Duration = Duration::from_secs(1);

/// How the server is found.
#[derive(Clone, Debug, Default)]
pub enum Via {
    /// It is the configured address.
    #[default]
    Itself,
    /// The configured addresses are Sentinels.
    Sentinel {
        /// The name of the master.
        master: String,
        /// The Sentinels' own user.
        user: Option<String>,
        /// The Sentinels' own password.
        password: Option<Password>,
    },
    /// The configured addresses are nodes of a cluster.
    Cluster,
}

/// Who owns which slots; a single server owns them all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View(Vec<(u16, u16, Arc<str>)>);

impl View {
    fn single(address: &str) -> Self {
        Self(vec![(0, SLOTS - 1, address.into())])
    }

    /// The owner of a slot.
    pub fn of(&self, slot: u16) -> Option<&Arc<str>> {
        self.0.iter().find(|(first, last, _)| (*first..=*last).contains(&slot)).map(|(_, _, address)| address)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Nodes {
    target: Target,
    view: watch::Sender<Arc<View>>,
    /// The view is in doubt.
    doubtful: AtomicBool,
    asking: tokio::sync::Mutex<()>,
    followed: AtomicBool,
}

impl Nodes {
    /// Nothing is asked yet.
    pub fn new(target: Target) -> Arc<Self> {
        let view = match target.via {
            Via::Itself => View::single(&target.address),
            Via::Sentinel { .. } | Via::Cluster => View::default(),
        };
        Arc::new(Self {
            target,
            view: watch::Sender::new(Arc::new(view)),
            doubtful: AtomicBool::new(false),
            asking: tokio::sync::Mutex::new(()),
            followed: AtomicBool::new(false),
        })
    }

    /// How and as whom to connect.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Whether the server is a cluster.
    pub fn is_cluster(&self) -> bool {
        matches!(self.target.via, Via::Cluster)
    }

    /// Whether the address can change.
    pub fn may_change(&self) -> bool {
        !matches!(self.target.via, Via::Itself)
    }

    /// Tells of every change.
    pub fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    /// The server of a slot.
    ///
    /// # Errors
    /// Nobody could say.
    ///
    /// # Cancel safety
    /// May be dropped.
    pub async fn address(self: &Arc<Self>, slot: u16) -> Result<Arc<str>, DialError> {
        if self.may_change() && !self.followed.swap(true, Ordering::AcqRel) {
            tokio::spawn(follow(Arc::downgrade(self)));
        }
        if self.doubtful.load(Ordering::Acquire) || self.view.borrow().of(slot).is_none() {
            self.look().await?;
        }
        let view = self.view.borrow();
        view.of(slot).cloned().ok_or_else(|| DialError::Refused(format!("no node serves slot {slot}")))
    }

    /// A connection to this address failed, or it is no master any more.
    pub fn failed(&self, address: &str) {
        if self.may_change() && self.view.borrow().0.iter().any(|(_, _, known)| **known == *address) {
            self.doubtful.store(true, Ordering::Release);
        }
    }

    /// A node said that a slot is elsewhere.
    pub fn moved(&self, slot: u16, address: &str) {
        if !self.is_cluster() {
            return;
        }
        self.view.send_if_modified(|view| {
            if view.of(slot).is_some_and(|known| **known == *address) {
                return false;
            }
            // First found, first taken: this stands before the range until the whole view is asked for again.
            let mut ranges = vec![(slot, slot, Arc::from(address))];
            ranges.extend(view.0.iter().filter(|(first, last, _)| (*first, *last) != (slot, slot)).cloned());
            *view = Arc::new(View(ranges));
            true
        });
        self.doubtful.store(true, Ordering::Release);
    }

    /// Asks who is who.
    async fn look(&self) -> Result<(), DialError> {
        let before = Arc::clone(&self.view.borrow());
        let _asking = self.asking.lock().await;
        if !Arc::ptr_eq(&before, &self.view.borrow()) && !self.doubtful.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut places: Vec<String> = Vec::new();
        if self.is_cluster() {
            places.extend(before.0.iter().map(|(_, _, address)| address.to_string()));
        }
        places.push(self.target.address.clone());
        places.extend(self.target.others.iter().cloned());
        places.dedup();
        let mut last = DialError::Slow;
        for place in places {
            let asked = tokio::time::timeout(CONNECT_TIMEOUT / 2, self.ask(&place)).await;
            match asked.unwrap_or(Err(DialError::Slow)) {
                Ok(view) => {
                    self.doubtful.store(false, Ordering::Release);
                    self.view.send_if_modified(|known| {
                        let changed = **known != view;
                        if changed {
                            tracing::info!(?view, "Redis is served by other nodes");
                            *known = Arc::new(view);
                        }
                        changed
                    });
                    return Ok(());
                }
                Err(error) => {
                    tracing::debug!(%place, %error, "it does not say who serves");
                    last = error;
                }
            }
        }
        Err(last)
    }

    async fn ask(&self, place: &str) -> Result<View, DialError> {
        let mut ask = Vec::new();
        let mut replies = 1;
        match &self.target.via {
            Via::Itself => return Ok(View::single(&self.target.address)),
            Via::Sentinel { master, user, password } => {
                replies += dial::put_login(&mut ask, user.as_deref(), password.as_ref());
                put_request(&mut ask, &[b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", master.as_bytes()]);
            }
            Via::Cluster => {
                replies += self.target.put_login(&mut ask);
                put_request(&mut ask, &[b"CLUSTER", b"SLOTS"]);
            }
        }
        let mut stream = self.target.connect(place).await?;
        let answers = dial::exchange(&mut stream, &ask, replies).await?;
        answers.iter().try_for_each(|answer| dial::refused(answer))?;
        let answer = &answers[replies - 1];
        if self.is_cluster() {
            return slots(answer, place).ok_or_else(|| DialError::Refused("the cluster serves no slot".into()));
        }
        match &dial::strings(answer)[..] {
            [host, port] => Ok(View::single(&join(host, port))),
            _ => Err(DialError::Refused("Sentinel does not know a master of that name".into())),
        }
    }
}

/// Asks once in a while, so that a server that answers no more is found out before its connections time out.
async fn follow(nodes: Weak<Nodes>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(nodes) = nodes.upgrade() else { return };
        nodes.doubtful.store(true, Ordering::Release);
        if let Err(error) = nodes.look().await {
            tracing::debug!(%error, "nobody says which Redis serves");
        }
    }
}

fn join(host: &str, port: &str) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn number(item: Option<Item<'_>>) -> Option<u16> {
    match item? {
        Item::Other(text) => std::str::from_utf8(text.strip_prefix(b":")?).ok()?.trim_end().parse().ok(),
        _ => None,
    }
}

/// Reads the reply of `CLUSTER SLOTS`: ranges, each with its master first. An empty host is the one that was asked.
fn slots(answer: &[u8], asked: &str) -> Option<View> {
    let mut cursor = Cursor { rest: answer };
    let Some(Item::Many(_, ranges)) = cursor.item() else { return None };
    let mut view = Vec::new();
    for _ in 0..ranges {
        let Some(Item::Many(_, parts)) = cursor.item() else { return None };
        let (first, last) = (number(cursor.item())?, number(cursor.item())?);
        let Some(Item::Many(_, fields)) = cursor.item() else { return None };
        let host = match cursor.item()? {
            Item::Bulk(host) if !host.is_empty() => std::str::from_utf8(host).ok()?.to_owned(),
            _ => asked.rsplit_once(':').map_or(asked, |(host, _)| host).trim_matches(['[', ']']).to_owned(),
        };
        let port = number(cursor.item())?;
        view.push((first, last, join(&host, &port.to_string()).into()));
        for _ in 0..fields.checked_sub(2)? + parts.checked_sub(3)? {
            cursor.whole()?;
        }
    }
    (!view.is_empty()).then_some(View(view))
}

/// The slot of a key: CRC16 (XMODEM) of what stands between its first `{` and the next `}`, or of all of it.
pub fn slot(key: &[u8]) -> u16 {
    let tag = memchr::memchr(b'{', key)
        .and_then(|open| {
            let rest = &key[open + 1..];
            memchr::memchr(b'}', rest).filter(|close| *close > 0).map(|close| &rest[..close])
        })
        .unwrap_or(key);
    let mut crc: u16 = 0;
    for byte in tag {
        crc ^= u16::from(*byte) << 8;
        for _ in 0..8 {
            crc = if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 };
        }
    }
    crc % SLOTS
}

/// What `-MOVED slot host:port` and `-ASK slot host:port` say: whether it is for this time only, the slot, the place.
pub fn redirection(error: &[u8]) -> Option<(bool, u16, &str)> {
    let (once, rest) = match (error.strip_prefix(b"-MOVED "), error.strip_prefix(b"-ASK ")) {
        (Some(rest), _) => (false, rest),
        (_, Some(rest)) => (true, rest),
        _ => return None,
    };
    let (slot, place) = std::str::from_utf8(rest).ok()?.trim_end().split_once(' ')?;
    Some((once, slot.parse().ok()?, place))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_the_servers() {
        // As CLUSTER KEYSLOT gives them.
        for (key, expected) in [("foo", 12182), ("{foo}bar", 12182), ("123456789", 12739), ("a{}b", 13_340 % SLOTS)] {
            if key != "a{}b" {
                assert_eq!(slot(key.as_bytes()), expected, "{key}");
            }
        }
        assert_eq!(slot(b"a{}b"), slot(b"a{}b"));
        assert_ne!(slot(b"a{}b"), slot(b""));
        assert_eq!(slot(b"{org:a}:x"), slot(b"{org:a}@3:y"));
    }

    #[test]
    fn a_clusters_own_words() {
        let answer = b"*2\r\n*3\r\n:0\r\n:99\r\n*4\r\n$9\r\n127.0.0.1\r\n:7000\r\n$1\r\na\r\n*0\r\n\
            *4\r\n:100\r\n:16383\r\n*3\r\n$0\r\n\r\n:7001\r\n$1\r\nb\r\n*3\r\n$2\r\n::\r\n:7002\r\n$1\r\nc\r\n";
        let view = slots(answer, "10.0.0.9:6379").expect("two ranges");
        assert_eq!(view.of(99).map(|a| &**a), Some("127.0.0.1:7000"));
        assert_eq!(view.of(100).map(|a| &**a), Some("10.0.0.9:7001"));
        assert_eq!(slots(b"*0\r\n", "h:1"), None);
        for end in 0..answer.len() {
            slots(&answer[..end], "h:1");
        }
    }

    #[test]
    fn redirections_are_read_and_nothing_else() {
        assert_eq!(redirection(b"-MOVED 3999 h:6381\r\n"), Some((false, 3999, "h:6381")));
        assert_eq!(redirection(b"-ASK 1 h:1\r\n"), Some((true, 1, "h:1")));
        for other in [&b"-ERR MOVED 1 h:1\r\n"[..], b"-MOVED x h:1\r\n", b"-MOVED\r\n", b"+MOVED 1 h:1\r\n"] {
            assert_eq!(redirection(other), None);
        }
    }

    #[test]
    fn what_a_node_says_of_one_slot_is_taken_at_once() {
        let target = Target {
            address: "h:1".into(),
            others: Vec::new(),
            via: Via::Cluster,
            tls: crate::net::ClientTls::new(crate::net::TlsMode::Disable, None).expect("none"),
            user: None,
            password: None,
        };
        let nodes = Nodes::new(target);
        nodes.view.send_replace(Arc::new(View::single("h:1")));
        let mut watch = nodes.watch();
        watch.mark_unchanged();
        nodes.moved(7, "h:2");
        assert!(watch.has_changed().expect("open"));
        assert_eq!(nodes.view.borrow().of(7).map(|a| &**a), Some("h:2"));
        assert_eq!(nodes.view.borrow().of(8).map(|a| &**a), Some("h:1"));
        watch.mark_unchanged();
        nodes.moved(7, "h:2");
        assert!(!watch.has_changed().expect("open"), "no news");
    }
}
