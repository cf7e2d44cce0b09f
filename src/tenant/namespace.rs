//! The only code that joins a tenant with the name of a database or role in a shared server, and the only code
//! that derives upstream passwords. Nobody else may build such a name.
//!
//! Names are opaque by default: `t_` and 20 base32 characters of HMAC-SHA-256(root secret, org), because a
//! tenant can read the shared catalogs (`pg_database`, `pg_roles`) of its server.

use std::fmt;

use aws_lc_rs::hmac;
use data_encoding::BASE32_NOPAD;
use serde::Deserialize;

use super::{DEFAULT_NAME, OrgId};

/// Longest identifier that PostgreSQL keeps (NAMEDATALEN - 1); longer ones are cut silently.
const IDENTIFIER_MAX_BYTES: usize = 63;

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

impl Names {
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

    /// Role and physical database of a logical database name. The caller has checked that the tenant has it
    /// ([`super::Tenant::has_database`]).
    pub fn postgres(&self, org: &OrgId, database: &str) -> Namespace {
        let role = self.base(org);
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
                let place = names.postgres(&org(o), d);
                assert!(seen.insert(place.database.clone()), "{place:?}");
                assert!(place.database.len() <= 63);
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
    fn a_short_root_secret_is_refused() {
        assert!(RootSecret::new(&[1; 31]).is_none());
    }
}
