//! Which server answers for a tenant now: the one that is configured, the master that Sentinel names, or the node of
//! a cluster that owns the tenant's slot.
//!
//! ```text
//!   address(slot) ── known? ──▶ address
//!                └─ ask: Sentinel "get-master-addr-by-name" · any node "CLUSTER SLOTS"
//!   a connection fails, a server says READONLY or MOVED ──▶ failed / doubt ──▶ asked again
//!   once a second: asked anyway; a change reaches every connection through `watch`
//! ```
//!
//! Only what was configured, and what those named in answer to our own question, is ever dialled: an address in a
//! reply to a tenant's command is none of these.
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
    again::Elsewhere,
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

    /// Every owner, once.
    fn owners(&self) -> Vec<Arc<str>> {
        let mut owners: Vec<_> = self.0.iter().map(|(_, _, address)| Arc::clone(address)).collect();
        owners.sort();
        owners.dedup();
        owners
    }
}

/// See the module.
#[derive(Debug)]
pub struct Nodes {
    target: Target,
    view: watch::Sender<Arc<View>>,
    /// The view is in doubt.
    doubtful: AtomicBool,
    /// The known node that raised the doubt, to be asked first: it is the one that knows more.
    doubter: parking_lot::Mutex<Option<Arc<str>>>,
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
            doubter: parking_lot::Mutex::default(),
            asking: tokio::sync::Mutex::new(()),
            followed: AtomicBool::new(false),
        })
    }

    /// How and as whom to connect.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The server of a slot as far as it is known without asking.
    pub fn known(&self, slot: u16) -> Option<Arc<str>> {
        self.view.borrow().of(slot).cloned()
    }

    /// All masters that own slots, as far as they are known without asking.
    pub fn masters(&self) -> Vec<Arc<str>> {
        self.view.borrow().owners()
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

    /// The node `here` said that a slot is elsewhere: who is who is asked again, it first.
    pub fn doubt(&self, here: &Arc<str>) {
        if self.is_cluster() {
            *self.doubter.lock() = Some(Arc::clone(here));
            self.doubtful.store(true, Ordering::Release);
        }
    }

    /// Where a slot is that a node says is elsewhere. Its words are a reason to ask and no more: the address given is
    /// one that known nodes name in answer to our own question.
    ///
    /// # Errors
    /// Nobody could be asked, or the cluster does not say the same.
    pub async fn elsewhere(&self, to: &Elsewhere) -> Result<Arc<str>, DialError> {
        if !self.is_cluster() {
            return Err(DialError::Refused("it is no cluster".to_owned()));
        }
        if to.once {
            let known = self.view.borrow().0.iter().any(|(_, _, address)| *address == to.address);
            // A node that is being given its first slot serves none yet.
            if known || tokio::time::timeout(CONNECT_TIMEOUT, self.is_member(to)).await.unwrap_or(Ok(false))? {
                return Ok(Arc::clone(&to.address));
            }
            return Err(DialError::Refused("the cluster has no such node".to_owned()));
        }
        self.doubt(&to.here);
        self.look().await?;
        match self.view.borrow().of(to.slot) {
            Some(address) if *address != to.here => Ok(Arc::clone(address)),
            _ => Err(DialError::Refused("the cluster says that the slot is where it was".to_owned())),
        }
    }

    /// Whether the node that names another counts it to its cluster.
    async fn is_member(&self, to: &Elsewhere) -> Result<bool, DialError> {
        if !self.is_known(&to.here) {
            return Ok(false);
        }
        let mut ask = Vec::new();
        let logins = self.target.put_login(&mut ask);
        put_request(&mut ask, &[b"CLUSTER", b"NODES"]);
        let mut stream = self.target.connect(&to.here).await?;
        let answers = dial::exchange(&mut stream, &ask, logins + 1).await?;
        answers.iter().try_for_each(|answer| dial::refused(answer))?;
        let listed = dial::strings(&answers[logins]);
        Ok(listed.first().is_some_and(|list| lists(list, &to.address)))
    }

    /// Whether an address was configured, or named by one that was.
    fn is_known(&self, address: &str) -> bool {
        self.target.address == address
            || self.target.others.iter().any(|other| other == address)
            || self.view.borrow().0.iter().any(|(_, _, known)| **known == *address)
    }

    /// Asks who is who.
    async fn look(&self) -> Result<(), DialError> {
        let before = Arc::clone(&self.view.borrow());
        let _asking = self.asking.lock().await;
        if !Arc::ptr_eq(&before, &self.view.borrow()) && !self.doubtful.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut places: Vec<String> = Vec::new();
        let doubter = self.doubter.lock().take();
        places.extend(doubter.filter(|here| self.is_known(here)).map(|here| here.to_string()));
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

/// Whether the reply of `CLUSTER NODES` (`id ip:port@bus[,host] flags …` per line) lists an address.
fn lists(reply: &str, address: &str) -> bool {
    reply.lines().any(|line| {
        let Some((place, rest)) = line.split(' ').nth(1).and_then(|field| field.split_once('@')) else { return false };
        let Some((ip, port)) = place.rsplit_once(':') else { return false };
        let hosts = std::iter::once(ip).chain(rest.split(',').nth(1));
        hosts.filter(|host| !host.is_empty()).any(|host| join(host, port) == address)
    })
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
        assert_eq!(view.owners().iter().map(|a| &**a).collect::<Vec<_>>(), ["10.0.0.9:7001", "127.0.0.1:7000"]);
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
    fn the_members_of_a_cluster() {
        let reply = "07c3 127.0.0.1:30004@31004,host-4 slave e7d1 0 1 4 connected\n\
            67ed 127.0.0.1:30002@31002 master - 0 1 2 connected 5461-10922\n\
            e7d1 :30001@31001 myself,master - 0 0 1 connected\nx ::1:7@8 master - 0 0 1 connected\n";
        for address in ["127.0.0.1:30004", "host-4:30004", "127.0.0.1:30002", "[::1]:7"] {
            assert!(lists(reply, address), "{address}");
        }
        for address in ["127.0.0.1:31004", "evil:30004", "127.0.0.1:3000", "", ":30001", "master:5461"] {
            assert!(!lists(reply, address), "{address}");
        }
    }

    #[test]
    fn words_about_another_slot_are_text() {
        let here: Arc<str> = "h:1".into();
        let parse = |error: &[u8], own| Elsewhere::parse(error, &here, own).map(|to| to.address);
        assert_eq!(parse(b"-MOVED 7 h:2\r\n", 7).as_deref(), Some("h:2"));
        assert_eq!(parse(b"-MOVED 7 :3\r\n", 7).as_deref(), Some("h:3"));
        assert_eq!(parse(b"-MOVED 8 h:2\r\n", 7), None);
        assert_eq!(parse(b"-ASK 8 h:2\r\n", 7), None);
    }
}
