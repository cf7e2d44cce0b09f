//! The only code that joins a tenant with the name of a database or role in a shared server, and the only code
//! that derives upstream passwords. Nobody else may build such a name.
//!
//! Names are opaque by default: `t_` and 20 base32 characters of HMAC-SHA-256(root secret, org), because a
//! tenant can read the shared catalogs (`pg_database`, `pg_roles`) of its server.

use std::fmt;

use aws_lc_rs::hmac;
use data_encoding::BASE32_NOPAD;
use serde::Deserialize;

use super::{DEFAULT_NAME, Isolation, OrgId, Protocol};

/// Longest identifier that PostgreSQL keeps (NAMEDATALEN - 1); longer ones are cut silently.
const IDENTIFIER_MAX_BYTES: usize = 63;

/// The organisation that a host stands for: `<org>.<domain>`, in any case, with or without a port and its root's dot.
pub fn org_of_host(host: &str, domain: &str) -> Option<OrgId> {
    let host = host.rsplit_once(':').map_or(host, |(host, port)| match port.parse::<u16>() {
        Ok(_) => host,
        Err(_) => "",
    });
    // A name with its root's dot is the same host.
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    OrgId::parse(host.strip_suffix(domain)?.strip_suffix('.')?)
}

/// Whether tenants' hosts can be below `domain`: a host name in lower case.
pub fn is_domain(domain: &str) -> bool {
    !domain.is_empty() && domain.split('.').all(|label| OrgId::parse(label).is_some_and(|_| label.len() < 64))
}

/// How physical names look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NameStyle {
    /// `t_` and 20 characters that tell nothing.
    Opaque,
    /// `org_<id>`: readable, and readable to every other tenant of the server.
    Plain,
}

/// The secret from which names and upstream passwords are derived. Its `Debug` prints nothing.
#[derive(Clone)]
pub struct RootSecret(hmac::Key);

impl RootSecret {
    /// Shortest acceptable secret in bytes.
    pub const MIN_BYTES: usize = 32;

    /// Gives the secret, or `None` when it is shorter than [`Self::MIN_BYTES`].
    pub fn new(bytes: &[u8]) -> Option<Self> {
        (bytes.len() >= Self::MIN_BYTES).then(|| Self(hmac::Key::new(hmac::HMAC_SHA256, bytes)))
    }

    /// HMAC over `parts` joined by NUL, which no part contains: two lists never give one input.
    fn derive(&self, parts: &[&str]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.0);
        for part in parts {
            context.update(part.as_bytes());
            context.update(&[0]);
        }
        context.sign()
    }
}

impl fmt::Debug for RootSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RootSecret")
    }
}

/// A derived upstream password. Its `Debug` prints nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    /// Wraps a configured password.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The secret itself: for the upstream login only.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password")
    }
}

/// Derives every physical name and credential.
#[derive(Clone, Debug)]
pub struct Names {
    root: RootSecret,
    style: NameStyle,
}

/// A tenant's place in a shared Postgres: its login role and one of its databases.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Namespace {
    /// The login role, owned by this tenant alone.
    pub role: String,
    /// The physical database.
    pub database: String,
}

/// A tenant's place in a shared Redis: its ACL user and the prefix of its keys and channels.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RedisNamespace {
    /// The ACL user, this tenant's alone.
    pub user: String,
    /// `org:<name>`: letters, digits, `_` and `-` only, so that it is literal inside a glob.
    stem: String,
}

impl RedisNamespace {
    /// What stands before every key of one logical database: `org:<name>:`, or `org:<name>@n:`.
    pub fn prefix(&self, database: u32) -> Vec<u8> {
        match database {
            0 => format!("{}:", self.stem),
            n => format!("{}@{n}:", self.stem),
        }
        .into_bytes()
    }

    /// What stands before every channel; channels are common to all logical databases.
    pub fn channel_prefix(&self) -> Vec<u8> {
        self.prefix(0)
    }

    /// The same with the name as a hash tag, so that all of the tenant is in one slot of a cluster.
    pub fn tagged(mut self) -> Self {
        self.stem = format!("{{{}}}", self.stem);
        self
    }

    /// A glob that matches every key of the tenant (and may match others: look at the prefix).
    pub fn pattern(&self) -> Vec<u8> {
        format!("{}*", self.stem).into_bytes()
    }

    /// The key patterns of an ACL that cover all logical databases and nothing else.
    pub fn key_patterns(&self) -> [String; 2] {
        [format!("~{}:*", self.stem), format!("~{}@*", self.stem)]
    }

    /// The channel pattern of an ACL.
    pub fn channel_pattern(&self) -> String {
        format!("&{}:*", self.stem)
    }

    /// The key under which the platform keeps the tenant's logical databases. Outside every tenant's prefix.
    pub fn registry(&self) -> String {
        format!("dynabase:databases:{}", self.stem)
    }
}

/// Longest database name that MongoDB keeps.
const MONGO_DATABASE_MAX_BYTES: usize = 63;

/// What MongoDB refuses inside a database name on any platform.
const MONGO_FORBIDDEN: &[u8] = b"/\\. \"$*<>:|?\0";

/// What stands before the shared databases of `filter` isolation. No tenant's own prefix and no database of the
/// platform begins like it.
const MONGO_SHARED: &str = "shared_";

/// A tenant's place in a shared MongoDB: its server user, and what stands before the names of its databases.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MongoNamespace {
    /// The server user of `database` isolation, this tenant's alone.
    pub user: String,
    /// Ends where the logical name begins; no tenant's prefix begins another's.
    prefix: String,
}

impl MongoNamespace {
    /// The physical name of a logical database, or `None` for a name that the server would not take, or not at that
    /// length.
    pub fn physical(&self, logical: &str) -> Option<String> {
        self.accepts(logical).then(|| format!("{}{logical}", self.prefix))
    }

    /// Appends the physical name; false, and nothing appended, for a name that [`Self::physical`] has none for.
    pub fn put_physical(&self, logical: &str, out: &mut Vec<u8>) -> bool {
        let accepted = self.accepts(logical);
        if accepted {
            out.extend_from_slice(self.prefix.as_bytes());
            out.extend_from_slice(logical.as_bytes());
        }
        accepted
    }

    /// The logical name of a physical database, or `None` for one that is not the tenant's.
    pub fn logical<'n>(&self, physical: &'n str) -> Option<&'n str> {
        physical.strip_prefix(self.prefix.as_str()).filter(|logical| !logical.is_empty())
    }

    /// What stands before every name; for taking it out of texts.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Longest logical database name in bytes.
    pub fn longest(&self) -> usize {
        MONGO_DATABASE_MAX_BYTES - self.prefix.len()
    }

    /// Whether there is a physical name for a logical database.
    pub fn accepts(&self, logical: &str) -> bool {
        (1..=self.longest()).contains(&logical.len()) && !logical.bytes().any(|b| MONGO_FORBIDDEN.contains(&b))
    }
}

impl Names {
    /// User and database prefix of a tenant. Under `filter` isolation all tenants have one prefix.
    pub fn mongodb(&self, org: &OrgId, isolation: Isolation) -> MongoNamespace {
        let user = self.base(org);
        let prefix = match (isolation, self.style) {
            (Isolation::Filter, _) => MONGO_SHARED.to_owned(),
            (Isolation::Database, NameStyle::Opaque) => format!("{user}_"),
            // A tilde appears in no organisation id, so `a` + `b_c` and `a_b` + `c` stay apart.
            (Isolation::Database, NameStyle::Plain) => format!("{user}~"),
        };
        MongoNamespace { user, prefix }
    }

    /// A key of 32 bytes, the tenant's alone, for one purpose inside this process: hiding what servers call things.
    pub fn mask(&self, purpose: &str, org: &OrgId) -> [u8; 32] {
        let tag = self.root.derive(&["mask", purpose, org.as_str()]);
        let mut key = [0; 32];
        key.copy_from_slice(tag.as_ref());
        key
    }

    /// ACL user and prefix of a tenant.
    pub fn redis(&self, org: &OrgId) -> RedisNamespace {
        let user = self.base(org);
        let stem = match self.style {
            NameStyle::Plain => format!("org:{org}"),
            NameStyle::Opaque => format!("org:{user}"),
        };
        RedisNamespace { user, stem }
    }

    /// Derives from `root` in the given style.
    pub fn new(root: RootSecret, style: NameStyle) -> Self {
        Self { root, style }
    }

    /// The tenant's base name: its role, and the prefix of all that is its own.
    pub fn base(&self, org: &OrgId) -> String {
        match self.style {
            NameStyle::Plain => format!("org_{org}"),
            NameStyle::Opaque => format!("t_{}", self.short(&["name", org.as_str()])),
        }
    }

    /// Role and physical database of a logical database name in the tenant's main home. The caller has checked that
    /// the tenant has it ([`super::Tenant::has_database`]).
    pub fn postgres(&self, org: &OrgId, database: &str) -> Namespace {
        self.sql(Protocol::Postgres, org, database)
    }

    /// Role and physical database of a logical database name in the tenant's home of `protocol`: the Neon one for
    /// [`Protocol::Neon`], where `<database>@<branch>` is a name too, else the main one. Homes share no name, so that
    /// both may lie on one server. The caller has checked that the tenant has it
    /// ([`super::Tenant::has_database_in`]).
    pub fn sql(&self, protocol: Protocol, org: &OrgId, database: &str) -> Namespace {
        let role = match (protocol, self.style) {
            (Protocol::Neon, NameStyle::Plain) => format!("neon_org_{org}"),
            (Protocol::Neon, NameStyle::Opaque) => format!("n_{}", self.short(&["neon name", org.as_str()])),
            _ => self.base(org),
        };
        let physical = if database == DEFAULT_NAME {
            role.clone()
        } else {
            // A dot appears in no organisation id, so `a` + `b_c` and `a_b` + `c` stay apart.
            let plain = format!("{role}.{database}");
            match self.style {
                NameStyle::Plain if plain.len() <= IDENTIFIER_MAX_BYTES => plain,
                _ => format!("{}.{}", &role[..role.len().min(40)], self.short(&["database", org.as_str(), database])),
            }
        };
        Namespace { role, database: physical }
    }

    /// The upstream password of a tenant for one purpose (`"postgres"`, …) and credential generation.
    pub fn password(&self, purpose: &str, org: &OrgId, generation: u32) -> Password {
        let tag = self.root.derive(&["password", purpose, org.as_str(), &generation.to_string()]);
        Password(data_encoding::BASE64URL_NOPAD.encode(tag.as_ref()))
    }

    /// The seed of a signing key of the platform's own; another `attempt` gives another.
    pub fn signing_seed(&self, purpose: &str, attempt: u32) -> [u8; 32] {
        let tag = self.root.derive(&["signing", purpose, &attempt.to_string()]);
        let mut seed = [0; 32];
        seed.copy_from_slice(&tag.as_ref()[..32]);
        seed
    }

    /// 20 lower-case base32 characters: 100 bits.
    fn short(&self, parts: &[&str]) -> String {
        let mut text = BASE32_NOPAD.encode(self.root.derive(parts).as_ref()).to_ascii_lowercase();
        text.truncate(20);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(style: NameStyle) -> Names {
        Names::new(RootSecret::new(&[7; 32]).expect("32 bytes"), style)
    }

    fn org(text: &str) -> OrgId {
        OrgId::parse(text).expect("valid org")
    }

    #[test]
    fn two_tenants_never_share_a_name() {
        for style in [NameStyle::Opaque, NameStyle::Plain] {
            let names = names(style);
            let mut seen = std::collections::HashSet::new();
            for (o, d) in
                [("a", "app"), ("a", "b"), ("a_b", "app"), ("a-b", "app"), ("a", "b_c"), ("a_b", "c"), ("b", "app")]
            {
                for protocol in [Protocol::Postgres, Protocol::Neon] {
                    let place = names.sql(protocol, &org(o), d);
                    assert!(seen.insert(place.database.clone()), "{place:?}");
                    assert!(place.database.len() <= 63);
                }
            }
            let long = org(&"x".repeat(48));
            assert_ne!(
                names.postgres(&long, &"y".repeat(60)).database,
                names.postgres(&long, &"y".repeat(61)).database
            );
        }
    }

    #[test]
    fn opaque_names_show_nothing_of_the_organisation() {
        let place = names(NameStyle::Opaque).postgres(&org("acme"), "reports");
        assert!(!place.role.contains("acme") && !place.database.contains("acme"));
        assert_eq!(names(NameStyle::Opaque).base(&org("acme")).len(), 22);
    }

    #[test]
    fn passwords_differ_by_purpose_org_and_generation() {
        let names = names(NameStyle::Opaque);
        let one = names.password("postgres", &org("a"), 1);
        assert_ne!(one, names.password("postgres", &org("a"), 2));
        assert_ne!(one, names.password("redis", &org("a"), 1));
        assert_ne!(one, names.password("postgres", &org("b"), 1));
        assert_eq!(format!("{one:?}"), "Password");
    }

    #[test]
    fn no_redis_prefix_begins_another() {
        for style in [NameStyle::Opaque, NameStyle::Plain] {
            let names = names(style);
            let prefixes: Vec<Vec<u8>> = ["a", "ab", "a-b", "a_b", "a0"]
                .into_iter()
                .flat_map(|text| [0, 1, 11].map(|n| names.redis(&org(text)).prefix(n)))
                .collect();
            for (i, one) in prefixes.iter().enumerate() {
                assert!(prefixes.iter().skip(i + 1).all(|other| !other.starts_with(one) && !one.starts_with(other)));
                assert!(one.iter().all(|b| b.is_ascii_alphanumeric() || b"_-:@".contains(b)));
            }
        }
    }

    #[test]
    fn no_mongo_prefix_begins_another_and_names_come_back() {
        for style in [NameStyle::Opaque, NameStyle::Plain] {
            let names = names(style);
            let places: Vec<MongoNamespace> =
                ["a", "ab", "a-b", "a_b", "a0"].map(|text| names.mongodb(&org(text), Isolation::Database)).into();
            for (at, one) in places.iter().enumerate() {
                let physical = one.physical("my_app").expect("a good name");
                assert_eq!(one.logical(&physical), Some("my_app"));
                assert!(!physical.starts_with(MONGO_SHARED));
                for other in places.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, other)| other) {
                    assert_eq!(other.logical(&physical), None);
                }
                let mut out = Vec::new();
                assert!(one.put_physical("my_app", &mut out));
                assert_eq!(out, physical.as_bytes());
            }
            let longest = names.mongodb(&org(&"x".repeat(48)), Isolation::Database);
            assert!(longest.longest() >= 8);
            assert_eq!(longest.physical(&"y".repeat(longest.longest())).map(|name| name.len()), Some(63));
            assert_eq!(longest.physical(&"y".repeat(longest.longest() + 1)), None);
            let shared = names.mongodb(&org("a"), Isolation::Filter);
            assert_eq!(shared.prefix(), names.mongodb(&org("b"), Isolation::Filter).prefix());
            for bad in ["", "a.b", "a/b", "a\\b", "a b", "a$", "a\0", "a\"", "*", "a:b", "a|b", "a?", "<", ">"] {
                assert_eq!(shared.physical(bad), None, "{bad:?}");
                assert!(!shared.put_physical(bad, &mut Vec::new()), "{bad:?}");
            }
            assert_eq!(shared.logical("shared_"), None);
            assert_eq!(shared.logical("admin"), None);
        }
    }

    #[test]
    fn all_of_a_tenant_is_in_one_slot_of_a_cluster() {
        let space = names(NameStyle::Plain).redis(&org("acme")).tagged();
        assert_eq!(space.prefix(0), b"{org:acme}:");
        assert_eq!(space.prefix(3), b"{org:acme}@3:");
        assert_eq!(space.registry(), "dynabase:databases:{org:acme}");
        assert_eq!(space.key_patterns(), ["~{org:acme}:*", "~{org:acme}@*"]);
    }

    #[test]
    fn a_short_root_secret_is_refused() {
        assert!(RootSecret::new(&[1; 31]).is_none());
    }
}
