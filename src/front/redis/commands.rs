//! Every command and subcommand of the server: where its keys stand, what becomes of it, what its reply carries.
//!
//! A command that is not in the table is refused as unknown. `tests/redis` asks the real server and fails on a
//! missing row or on key positions that differ from its own.

use crate::upstream::redis::reply::Shape;

/// Where the keys stand among the arguments (0 is the command's name).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// Nowhere.
    Nowhere,
    /// 1.
    At1,
    /// 2, after a subcommand.
    At2,
    /// 1 and 2.
    First2,
    /// All from 1.
    All,
    /// Every second from 1.
    Every2,
    /// All from 1 but the last, a timeout.
    AllButLast,
    /// All from 2.
    From2,
    /// As many from 2 as the number at 1 says.
    Num1,
    /// As many from 3 as the number at 2 says.
    Num2,
    /// 1, and as many from 3 as the number at 2 says.
    DestNum2,
    /// The first half of what follows `STREAMS`.
    Streams,
    /// 1, and what follows `STORE` or `STOREDIST`.
    Radius,
    /// 1, the patterns of `BY` and `GET`, and what follows `STORE`.
    Sort,
}

/// What becomes of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Its names are rewritten and it goes to the shared connection.
    Forward,
    /// The same on a connection of its own if it blocks.
    Block,
    /// Its pattern is rewritten.
    Pattern,
    /// Its channel is rewritten.
    Publish,
    /// It changes the client's subscriptions.
    Subscribe,
    /// It asks about channels: rewritten, and run by the platform's user.
    Pubsub,
    /// The platform's user runs it, since an ACL can't confine it.
    Service,
    /// It carries a script, which is wrapped.
    Script,
    /// `SORT`: forwarded, or run by the platform's user when it follows patterns.
    Sort,
    /// `MULTI`, `EXEC`, `DISCARD`.
    Transaction,
    /// `WATCH`, `UNWATCH`.
    Watch,
    /// Answered here.
    Local,
    /// Means nothing without a subcommand.
    Container,
    /// Not for tenants.
    Refuse,
}

/// Which of its keys a command may create, counted over the keys in the order of [`Keys`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    /// None.
    None,
    /// The first.
    First,
    /// The last.
    Last,
    /// Each.
    All,
    /// The target of `STORE`, if there is one.
    Store,
}

/// It may change the keyspace.
pub const WRITE: u8 = 1;
/// Redis itself refuses it when memory is short.
pub const GROW: u8 = 2;
/// It may prolong the life of its first key.
pub const TTL: u8 = 4;

/// One command or subcommand (`xgroup|create`).
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its name, lower case.
    pub name: &'static str,
    /// Arguments with the name; negative is a minimum.
    pub arity: i16,
    /// Where its keys stand.
    pub keys: Keys,
    /// What becomes of it.
    pub policy: Policy,
    /// [`WRITE`], [`GROW`], [`TTL`].
    pub flags: u8,
    /// Which keys it may create.
    pub made: Made,
    /// Where names stand in its reply.
    pub reply: Shape,
}

impl Row {
    /// Whether a call with `args` arguments (with the name, and the subcommand's) has the right number of them.
    pub fn fits(&self, args: usize) -> bool {
        let arity = usize::from(self.arity.unsigned_abs());
        if self.arity < 0 { args >= arity } else { args == arity }
    }

    /// Whether it may change the keyspace.
    pub fn writes(&self) -> bool {
        self.flags & WRITE != 0
    }

    /// Whether it is refused over the memory cap.
    pub fn grows(&self) -> bool {
        self.flags & GROW != 0
    }
}

/// Longest name of the table, with its subcommand.
const NAME_MAX: usize = 32;

/// Slots of the index: a power of two, sparse enough that most names are found at the first look.
const SLOTS: usize = 2048;

/// No row.
const EMPTY: u16 = u16::MAX;

static INDEX: [u16; SLOTS] = index();

const fn hash(name: &[u8]) -> usize {
    let mut hash: u32 = 0x811c_9dc5;
    let mut i = 0;
    while i < name.len() {
        hash = (hash ^ name[i] as u32).wrapping_mul(0x0100_0193);
        i += 1;
    }
    (hash ^ (hash >> 15)) as usize % SLOTS
}

const fn index() -> [u16; SLOTS] {
    let mut index = [EMPTY; SLOTS];
    let mut row = 0;
    while row < ROWS.len() {
        let mut slot = hash(ROWS[row].name.as_bytes());
        while index[slot] != EMPTY {
            slot = (slot + 1) % SLOTS;
        }
        index[slot] = row as u16;
        row += 1;
    }
    index
}

/// Finds a command by its name in any case, or a subcommand by both names.
#[inline]
pub fn find(name: &[u8], sub: Option<&[u8]>) -> Option<&'static Row> {
    let mut key = [0u8; NAME_MAX];
    let len = name.len() + sub.map_or(0, |sub| sub.len() + 1);
    if len > NAME_MAX {
        return None;
    }
    for (to, from) in key.iter_mut().zip(name) {
        *to = from.to_ascii_lowercase();
    }
    if let Some(sub) = sub {
        key[name.len()] = b'|';
        for (to, from) in key[name.len() + 1..].iter_mut().zip(sub) {
            *to = from.to_ascii_lowercase();
        }
    }
    let key = &key[..len];
    let mut slot = hash(key);
    loop {
        let row = INDEX[slot];
        if row == EMPTY {
            return None;
        }
        let row = &ROWS[usize::from(row)];
        if row.name.as_bytes() == key {
            return Some(row);
        }
        slot = (slot + 1) % SLOTS;
    }
}

/// What a tenant's ACL user may run: what we forward for it, and nothing that an ACL can't confine to its keys.
pub fn for_acl() -> Vec<&'static str> {
    let own = [
        "ping",
        "echo",
        "time",
        "multi",
        "exec",
        "discard",
        "watch",
        "unwatch",
        "script|load",
        "script|exists",
        // Tracking is switched on before a connection becomes the tenant's; this only says yes or no to one command.
        "client|caching",
        // Before a command that a node of a cluster sent on to the next.
        "asking",
    ];
    ROWS.iter()
        .filter(|row| {
            matches!(
                row.policy,
                Policy::Forward | Policy::Block | Policy::Pattern | Policy::Publish | Policy::Script | Policy::Sort
            )
        })
        .map(|row| row.name)
        .chain(own)
        .collect()
}

const fn row(name: &'static str, arity: i16, keys: Keys, policy: Policy, flags: u8, made: Made, reply: Shape) -> Row {
    Row { name, arity, keys, policy, flags, made, reply }
}

use Keys::{All, AllButLast, At1, At2, DestNum2, Every2, First2, From2, Nowhere, Num1, Num2, Radius, Streams};
use Policy::{
    Block, Container, Forward, Local, Pattern, Publish, Pubsub, Refuse, Script, Service, Sort, Subscribe, Transaction,
    Watch,
};

/// The table, by name.
#[rustfmt::skip]
pub static ROWS: &[Row] = &[
    row("acl", -2, Nowhere, Container, 0, Made::None, Shape::Raw),
    row("acl|cat", -2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("acl|deluser", -3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("acl|dryrun", -4, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("acl|genpass", -2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("acl|getuser", 3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("acl|help", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("acl|list", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("acl|load", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("acl|log", -2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("acl|save", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("acl|setuser", -3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("acl|users", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("acl|whoami", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("append", 3, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("asking", 1, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("auth", -2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("bgrewriteaof", 1, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("bgsave", -1, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("bitcount", -2, At1, Forward, 0, Made::None, Shape::Raw),
    row("bitfield", -2, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("bitfield_ro", -2, At1, Forward, 0, Made::None, Shape::Raw),
    row("bitop", -4, From2, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("bitpos", -3, At1, Forward, 0, Made::None, Shape::Raw),
    row("blmove", 6, First2, Block, WRITE | GROW, Made::Last, Shape::Raw),
    row("blmpop", -5, Num2, Block, WRITE, Made::None, Shape::First),
    row("blpop", -3, AllButLast, Block, WRITE, Made::None, Shape::First),
    row("brpop", -3, AllButLast, Block, WRITE, Made::None, Shape::First),
    row("brpoplpush", 4, First2, Block, WRITE | GROW, Made::Last, Shape::Raw),
    row("bzmpop", -5, Num2, Block, WRITE, Made::None, Shape::First),
    row("bzpopmax", -3, AllButLast, Block, WRITE, Made::None, Shape::First),
    row("bzpopmin", -3, AllButLast, Block, WRITE, Made::None, Shape::First),
    row("client", -2, Nowhere, Container, 0, Made::None, Shape::Raw),
    row("client|caching", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|capa", -3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|getname", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|getredir", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|help", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("client|id", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|import-source", 3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("client|info", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|kill", -3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|list", -2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|no-evict", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|no-touch", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|pause", -3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("client|reply", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|setinfo", 4, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|setname", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|tracking", -3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|trackinginfo", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("client|unblock", -3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("client|unpause", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("cluster", -2, Nowhere, Container, 0, Made::None, Shape::Raw),
    row("cluster|addslots", -3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|addslotsrange", -4, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|bumpepoch", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|count-failure-reports", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|countkeysinslot", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|delslots", -3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|delslotsrange", -4, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|failover", -2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|flushslots", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|forget", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|getkeysinslot", 4, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|help", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|info", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|keyslot", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|links", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|meet", -4, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|myid", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|myshardid", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|nodes", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|replicas", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|replicate", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|reset", -2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|saveconfig", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|set-config-epoch", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|setslot", -4, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|shards", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|slaves", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|slot-stats", -4, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("cluster|slots", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("command", -1, Nowhere, Container, 0, Made::None, Shape::Raw),
    row("commandlog", -2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("command|count", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("command|docs", -2, Nowhere, Forward, 0, Made::None, Shape::Raw),
    row("command|getkeys", -4, Nowhere, Forward, 0, Made::None, Shape::Raw),
    row("command|getkeysandflags", -4, Nowhere, Forward, 0, Made::None, Shape::Raw),
    row("command|help", 2, Nowhere, Forward, 0, Made::None, Shape::Raw),
    row("command|info", -2, Nowhere, Forward, 0, Made::None, Shape::Raw),
    row("command|list", -2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("config", -2, Nowhere, Container, 0, Made::None, Shape::Raw),
    row("config|get", -3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("config|help", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("config|resetstat", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("config|rewrite", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("config|set", -4, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("copy", -3, First2, Service, WRITE | GROW, Made::Last, Shape::Raw),
    row("dbsize", 1, Nowhere, Forward, 0, Made::None, Shape::Raw),
    row("debug", -2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("decr", 2, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("decrby", 3, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("del", -2, All, Forward, WRITE, Made::None, Shape::Raw),
    row("delex", -2, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("delifeq", 3, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("digest", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("discard", 1, Nowhere, Transaction, 0, Made::None, Shape::Raw),
    row("dump", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("echo", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("eval", -3, Num2, Script, 0, Made::None, Shape::Raw),
    row("eval_ro", -3, Num2, Script, 0, Made::None, Shape::Raw),
    row("evalsha", -3, Num2, Script, 0, Made::None, Shape::Raw),
    row("evalsha_ro", -3, Num2, Script, 0, Made::None, Shape::Raw),
    row("exec", 1, Nowhere, Transaction, 0, Made::None, Shape::Raw),
    row("exists", -2, All, Forward, 0, Made::None, Shape::Raw),
    row("expire", -3, At1, Forward, WRITE | TTL, Made::None, Shape::Raw),
    row("expireat", -3, At1, Forward, WRITE | TTL, Made::None, Shape::Raw),
    row("expiretime", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("failover", -1, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("fcall", -3, Num2, Script, 0, Made::None, Shape::Raw),
    row("fcall_ro", -3, Num2, Script, 0, Made::None, Shape::Raw),
    row("flushall", -1, Nowhere, Service, WRITE, Made::None, Shape::Raw),
    row("flushdb", -1, Nowhere, Forward, WRITE, Made::None, Shape::Raw),
    row("function", -2, Nowhere, Container, 0, Made::None, Shape::Raw),
    row("function|delete", 3, Nowhere, Service, 0, Made::None, Shape::Raw),
    row("function|dump", 2, Nowhere, Service, 0, Made::None, Shape::Raw),
    row("function|flush", -2, Nowhere, Service, 0, Made::None, Shape::Raw),
    row("function|help", 2, Nowhere, Service, 0, Made::None, Shape::Raw),
    row("function|kill", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("function|list", -2, Nowhere, Service, 0, Made::None, Shape::Raw),
    row("function|load", -3, Nowhere, Service, 0, Made::None, Shape::Raw),
    row("function|restore", -3, Nowhere, Service, 0, Made::None, Shape::Raw),
    row("function|stats", 2, Nowhere, Service, 0, Made::None, Shape::Raw),
    row("geoadd", -5, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("geodist", -4, At1, Forward, 0, Made::None, Shape::Raw),
    row("geohash", -2, At1, Forward, 0, Made::None, Shape::Raw),
    row("geopos", -2, At1, Forward, 0, Made::None, Shape::Raw),
    row("georadius", -6, Radius, Forward, WRITE | GROW, Made::Store, Shape::Raw),
    row("georadius_ro", -6, At1, Forward, 0, Made::None, Shape::Raw),
    row("georadiusbymember", -5, Radius, Forward, WRITE | GROW, Made::Store, Shape::Raw),
    row("georadiusbymember_ro", -5, At1, Forward, 0, Made::None, Shape::Raw),
    row("geosearch", -7, At1, Forward, 0, Made::None, Shape::Raw),
    row("geosearchstore", -8, First2, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("get", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("getbit", 3, At1, Forward, 0, Made::None, Shape::Raw),
    row("getdel", 2, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("getex", -2, At1, Forward, WRITE | TTL, Made::None, Shape::Raw),
    row("getrange", 4, At1, Forward, 0, Made::None, Shape::Raw),
    row("getset", 3, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("hdel", -3, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("hello", -1, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("hexists", 3, At1, Forward, 0, Made::None, Shape::Raw),
    row("hexpire", -6, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("hexpireat", -6, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("hexpiretime", -5, At1, Forward, 0, Made::None, Shape::Raw),
    row("hget", 3, At1, Forward, 0, Made::None, Shape::Raw),
    row("hgetall", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("hgetdel", -5, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("hgetex", -5, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("hincrby", 4, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("hincrbyfloat", 4, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("hkeys", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("hlen", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("hmget", -3, At1, Forward, 0, Made::None, Shape::Raw),
    row("hmset", -4, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("hotkeys", -2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("hpersist", -5, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("hpexpire", -6, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("hpexpireat", -6, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("hpexpiretime", -5, At1, Forward, 0, Made::None, Shape::Raw),
    row("hpttl", -5, At1, Forward, 0, Made::None, Shape::Raw),
    row("hrandfield", -2, At1, Forward, 0, Made::None, Shape::Raw),
    row("hscan", -3, At1, Forward, 0, Made::None, Shape::Raw),
    row("hset", -4, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("hsetex", -6, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("hsetnx", 4, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("hstrlen", 3, At1, Forward, 0, Made::None, Shape::Raw),
    row("httl", -5, At1, Forward, 0, Made::None, Shape::Raw),
    row("hvals", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("incr", 2, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("incrby", 3, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("incrbyfloat", 3, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("info", -1, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("keys", 2, Nowhere, Pattern, 0, Made::None, Shape::Keys),
    row("lastsave", 1, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("latency", -2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("latency|doctor", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("latency|graph", 3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("latency|help", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("latency|histogram", -2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("latency|history", 3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("latency|latest", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("latency|reset", -2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("lcs", -3, First2, Forward, 0, Made::None, Shape::Raw),
    row("lindex", 3, At1, Forward, 0, Made::None, Shape::Raw),
    row("linsert", 5, At1, Forward, WRITE | GROW, Made::None, Shape::Raw),
    row("llen", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("lmove", 5, First2, Forward, WRITE | GROW, Made::Last, Shape::Raw),
    row("lmpop", -4, Num1, Forward, WRITE, Made::None, Shape::First),
    row("lolwut", -1, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("lpop", -2, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("lpos", -3, At1, Forward, 0, Made::None, Shape::Raw),
    row("lpush", -3, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("lpushx", -3, At1, Forward, WRITE | GROW, Made::None, Shape::Raw),
    row("lrange", 4, At1, Forward, 0, Made::None, Shape::Raw),
    row("lrem", 4, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("lset", 4, At1, Forward, WRITE | GROW, Made::None, Shape::Raw),
    row("ltrim", 4, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("memory", -2, Nowhere, Container, 0, Made::None, Shape::Raw),
    row("memory|doctor", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("memory|help", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("memory|malloc-stats", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("memory|purge", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("memory|stats", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("memory|usage", -3, At2, Forward, 0, Made::None, Shape::Raw),
    row("mget", -2, All, Forward, 0, Made::None, Shape::Raw),
    row("migrate", -6, Nowhere, Refuse, WRITE, Made::None, Shape::Raw),
    row("module", -2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("module|help", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("module|list", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("module|load", -3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("module|loadex", -3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("module|unload", 3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("monitor", 1, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("move", 3, At1, Service, WRITE, Made::None, Shape::Raw),
    row("mset", -3, Every2, Forward, WRITE | GROW, Made::All, Shape::Raw),
    row("msetnx", -3, Every2, Forward, WRITE | GROW, Made::All, Shape::Raw),
    row("multi", 1, Nowhere, Transaction, 0, Made::None, Shape::Raw),
    row("object", -2, Nowhere, Container, 0, Made::None, Shape::Raw),
    row("object|encoding", 3, At2, Forward, 0, Made::None, Shape::Raw),
    row("object|freq", 3, At2, Forward, 0, Made::None, Shape::Raw),
    row("object|help", 2, Nowhere, Forward, 0, Made::None, Shape::Raw),
    row("object|idletime", 3, At2, Forward, 0, Made::None, Shape::Raw),
    row("object|refcount", 3, At2, Forward, 0, Made::None, Shape::Raw),
    row("persist", 2, At1, Forward, WRITE | TTL, Made::None, Shape::Raw),
    row("pexpire", -3, At1, Forward, WRITE | TTL, Made::None, Shape::Raw),
    row("pexpireat", -3, At1, Forward, WRITE | TTL, Made::None, Shape::Raw),
    row("pexpiretime", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("pfadd", -2, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("pfcount", -2, All, Forward, 0, Made::None, Shape::Raw),
    row("pfdebug", 3, Nowhere, Refuse, WRITE | GROW, Made::First, Shape::Raw),
    row("pfmerge", -2, All, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("pfselftest", 1, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("ping", -1, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("psetex", 4, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("psubscribe", -2, Nowhere, Subscribe, 0, Made::None, Shape::Raw),
    row("psync", -3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("pttl", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("publish", 3, Nowhere, Publish, 0, Made::None, Shape::Raw),
    row("pubsub", -2, Nowhere, Container, 0, Made::None, Shape::Raw),
    row("pubsub|channels", -2, Nowhere, Pubsub, 0, Made::None, Shape::Keys),
    row("pubsub|help", 2, Nowhere, Forward, 0, Made::None, Shape::Raw),
    row("pubsub|numpat", 2, Nowhere, Pubsub, 0, Made::None, Shape::Raw),
    row("pubsub|numsub", -2, Nowhere, Pubsub, 0, Made::None, Shape::Pairs),
    row("pubsub|shardchannels", -2, Nowhere, Pubsub, 0, Made::None, Shape::Keys),
    row("pubsub|shardnumsub", -2, Nowhere, Pubsub, 0, Made::None, Shape::Pairs),
    row("punsubscribe", -1, Nowhere, Subscribe, 0, Made::None, Shape::Raw),
    row("quit", -1, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("randomkey", 1, Nowhere, Forward, 0, Made::None, Shape::Key),
    row("readonly", 1, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("readwrite", 1, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("rename", 3, First2, Forward, WRITE, Made::None, Shape::Raw),
    row("renamenx", 3, First2, Forward, WRITE, Made::None, Shape::Raw),
    row("replconf", -1, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("replicaof", 3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("reset", 1, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("restore", -4, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("restore-asking", -4, At1, Refuse, WRITE | GROW, Made::First, Shape::Raw),
    row("role", 1, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("rpop", -2, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("rpoplpush", 3, First2, Forward, WRITE | GROW, Made::Last, Shape::Raw),
    row("rpush", -3, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("rpushx", -3, At1, Forward, WRITE | GROW, Made::None, Shape::Raw),
    row("sadd", -3, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("save", 1, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("scan", -2, Nowhere, Pattern, 0, Made::None, Shape::Scan),
    row("scard", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("script", -2, Nowhere, Container, 0, Made::None, Shape::Raw),
    row("script|debug", 3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("script|exists", -3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("script|flush", -2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("script|help", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("script|kill", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("script|load", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("sdiff", -2, All, Forward, 0, Made::None, Shape::Raw),
    row("sdiffstore", -3, All, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("select", 2, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("set", -3, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("setbit", 4, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("setex", 4, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("setnx", 3, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("setrange", 4, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("shutdown", -1, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("sinter", -2, All, Forward, 0, Made::None, Shape::Raw),
    row("sintercard", -3, Num1, Forward, 0, Made::None, Shape::Raw),
    row("sinterstore", -3, All, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("sismember", 3, At1, Forward, 0, Made::None, Shape::Raw),
    row("slaveof", 3, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("slowlog", -2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("slowlog|get", -2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("slowlog|help", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("slowlog|len", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("slowlog|reset", 2, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("smembers", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("smismember", -3, At1, Forward, 0, Made::None, Shape::Raw),
    row("smove", 4, First2, Forward, WRITE, Made::Last, Shape::Raw),
    row("sort", -2, Keys::Sort, Sort, WRITE | GROW, Made::Store, Shape::Raw),
    row("sort_ro", -2, Keys::Sort, Sort, 0, Made::None, Shape::Raw),
    row("spop", -2, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("spublish", 3, At1, Publish, 0, Made::None, Shape::Raw),
    row("srandmember", -2, At1, Forward, 0, Made::None, Shape::Raw),
    row("srem", -3, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("sscan", -3, At1, Forward, 0, Made::None, Shape::Raw),
    row("ssubscribe", -2, Nowhere, Subscribe, 0, Made::None, Shape::Raw),
    row("strlen", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("subscribe", -2, Nowhere, Subscribe, 0, Made::None, Shape::Raw),
    row("substr", 4, At1, Forward, 0, Made::None, Shape::Raw),
    row("sunion", -2, All, Forward, 0, Made::None, Shape::Raw),
    row("sunionstore", -3, All, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("sunsubscribe", -1, Nowhere, Subscribe, 0, Made::None, Shape::Raw),
    row("swapdb", 3, Nowhere, Service, WRITE, Made::None, Shape::Raw),
    row("sync", 1, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("time", 1, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("touch", -2, All, Forward, 0, Made::None, Shape::Raw),
    row("ttl", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("type", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("unlink", -2, All, Forward, WRITE, Made::None, Shape::Raw),
    row("unsubscribe", -1, Nowhere, Subscribe, 0, Made::None, Shape::Raw),
    row("unwatch", 1, Nowhere, Watch, 0, Made::None, Shape::Raw),
    row("vadd", -5, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("vcard", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("vdim", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("vemb", -3, At1, Forward, 0, Made::None, Shape::Raw),
    row("vgetattr", 3, At1, Forward, 0, Made::None, Shape::Raw),
    row("vinfo", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("vismember", 3, At1, Forward, 0, Made::None, Shape::Raw),
    row("vlinks", -3, At1, Forward, 0, Made::None, Shape::Raw),
    row("vrandmember", -2, At1, Forward, 0, Made::None, Shape::Raw),
    row("vrange", -4, At1, Forward, 0, Made::None, Shape::Raw),
    row("vrem", 3, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("vsetattr", 4, At1, Forward, WRITE | GROW, Made::None, Shape::Raw),
    row("vsim", -4, At1, Forward, 0, Made::None, Shape::Raw),
    row("wait", 3, Nowhere, Local, 0, Made::None, Shape::Raw),
    row("waitaof", 4, Nowhere, Refuse, 0, Made::None, Shape::Raw),
    row("watch", -2, All, Watch, 0, Made::None, Shape::Raw),
    row("xack", -4, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("xackdel", -6, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("xadd", -5, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("xautoclaim", -6, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("xclaim", -6, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("xdel", -3, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("xdelex", -5, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("xgroup", -2, Nowhere, Container, 0, Made::None, Shape::Raw),
    row("xgroup|create", -5, At2, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("xgroup|createconsumer", 5, At2, Forward, WRITE | GROW, Made::None, Shape::Raw),
    row("xgroup|delconsumer", 5, At2, Forward, WRITE, Made::None, Shape::Raw),
    row("xgroup|destroy", 4, At2, Forward, WRITE, Made::None, Shape::Raw),
    row("xgroup|help", 2, Nowhere, Forward, 0, Made::None, Shape::Raw),
    row("xgroup|setid", -5, At2, Forward, WRITE, Made::None, Shape::Raw),
    row("xinfo", -2, Nowhere, Container, 0, Made::None, Shape::Raw),
    row("xinfo|consumers", 4, At2, Forward, 0, Made::None, Shape::Raw),
    row("xinfo|groups", 3, At2, Forward, 0, Made::None, Shape::Raw),
    row("xinfo|help", 2, Nowhere, Forward, 0, Made::None, Shape::Raw),
    row("xinfo|stream", -3, At2, Forward, 0, Made::None, Shape::Raw),
    row("xlen", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("xpending", -3, At1, Forward, 0, Made::None, Shape::Raw),
    row("xrange", -4, At1, Forward, 0, Made::None, Shape::Raw),
    row("xread", -4, Streams, Block, 0, Made::None, Shape::Streams),
    row("xreadgroup", -7, Streams, Block, WRITE, Made::None, Shape::Streams),
    row("xrevrange", -4, At1, Forward, 0, Made::None, Shape::Raw),
    row("xsetid", -3, At1, Forward, WRITE | GROW, Made::None, Shape::Raw),
    row("xtrim", -4, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("zadd", -4, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("zcard", 2, At1, Forward, 0, Made::None, Shape::Raw),
    row("zcount", 4, At1, Forward, 0, Made::None, Shape::Raw),
    row("zdiff", -3, Num1, Forward, 0, Made::None, Shape::Raw),
    row("zdiffstore", -4, DestNum2, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("zincrby", 4, At1, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("zinter", -3, Num1, Forward, 0, Made::None, Shape::Raw),
    row("zintercard", -3, Num1, Forward, 0, Made::None, Shape::Raw),
    row("zinterstore", -4, DestNum2, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("zlexcount", 4, At1, Forward, 0, Made::None, Shape::Raw),
    row("zmpop", -4, Num1, Forward, WRITE, Made::None, Shape::First),
    row("zmscore", -3, At1, Forward, 0, Made::None, Shape::Raw),
    row("zpopmax", -2, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("zpopmin", -2, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("zrandmember", -2, At1, Forward, 0, Made::None, Shape::Raw),
    row("zrange", -4, At1, Forward, 0, Made::None, Shape::Raw),
    row("zrangebylex", -4, At1, Forward, 0, Made::None, Shape::Raw),
    row("zrangebyscore", -4, At1, Forward, 0, Made::None, Shape::Raw),
    row("zrangestore", -5, First2, Forward, WRITE | GROW, Made::First, Shape::Raw),
    row("zrank", 3, At1, Forward, 0, Made::None, Shape::Raw),
    row("zrem", -3, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("zremrangebylex", 4, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("zremrangebyrank", 4, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("zremrangebyscore", 4, At1, Forward, WRITE, Made::None, Shape::Raw),
    row("zrevrange", -4, At1, Forward, 0, Made::None, Shape::Raw),
    row("zrevrangebylex", -4, At1, Forward, 0, Made::None, Shape::Raw),
    row("zrevrangebyscore", -4, At1, Forward, 0, Made::None, Shape::Raw),
    row("zrevrank", 3, At1, Forward, 0, Made::None, Shape::Raw),
    row("zscan", -3, At1, Forward, 0, Made::None, Shape::Raw),
    row("zscore", 3, At1, Forward, 0, Made::None, Shape::Raw),
    row("zunion", -3, Num1, Forward, 0, Made::None, Shape::Raw),
    row("zunionstore", -4, DestNum2, Forward, WRITE | GROW, Made::First, Shape::Raw),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_found_in_any_case_and_nothing_else_is() {
        for row in ROWS {
            let upper = row.name.to_ascii_uppercase();
            let (name, sub) = upper.split_once('|').map_or((upper.as_str(), None), |(a, b)| (a, Some(b)));
            assert_eq!(find(name.as_bytes(), sub.map(str::as_bytes)).map(|r| r.name), Some(row.name));
        }
        for bad in ["", "ge", "gett", "get ", "xgroup|create|", "\u{212a}eys"] {
            assert!(find(bad.as_bytes(), None).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn nothing_that_an_acl_cannot_confine_is_allowed_upstream() {
        let allowed = for_acl();
        for name in [
            "select",
            "swapdb",
            "move",
            "copy",
            "flushall",
            "function",
            "function|load",
            "function|list",
            "function|delete",
            "function|flush",
            "function|restore",
            "config",
            "acl",
            "client",
            "cluster",
            "pubsub|channels",
            "subscribe",
            "psubscribe",
            "monitor",
            "info",
            "migrate",
            "script|flush",
            "debug",
            "reset",
            "hello",
            "auth",
            "memory|stats",
            "replicaof",
            "eval_ro_x",
            "wait",
        ] {
            assert!(!allowed.contains(&name), "{name}");
        }
    }
}
