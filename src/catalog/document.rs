//! Documents as operators see them, in files and in collections alike. Fields that we don't know are kept: operators
//! and later versions add their own.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, error::Category};

use super::{
    date,
    ledger::{DELETION, Deletion, KEPT, Kept, STAMP},
};
use crate::tenant::{
    OrgId, Routes, Status, Tenant, Tier,
    directory::{KeyHash, ServiceKey},
};

/// Most logical databases, and most logical users, of one tenant.
const NAMES_MAX: usize = 256;

/// Longest logical name in bytes: PostgreSQL's own limit.
const NAME_MAX_BYTES: usize = 63;

/// An organisation's document.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// What the proxy enforces.
    pub tenant: Tenant,
    /// When it was made: RFC 3339 in UTC; empty when nobody said.
    pub created_at: String,
    /// Every field that we don't know.
    pub more: Map<String, Value>,
}

/// A service key's document.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyRecord {
    /// What the proxy enforces.
    pub key: ServiceKey,
    /// When it was made: RFC 3339 in UTC; empty when nobody said.
    pub created_at: String,
    /// Every field that we don't know.
    pub more: Map<String, Value>,
}

#[derive(Serialize, Deserialize)]
struct OrgFields {
    #[serde(rename = "_id")]
    org: OrgId,
    tier: Tier,
    status: Status,
    epoch: u64,
    #[serde(default = "first_generation")]
    generation: u32,
    #[serde(default)]
    databases: Vec<String>,
    #[serde(default)]
    users: Vec<String>,
    #[serde(default, skip_serializing_if = "Routes::is_empty")]
    routes: Routes,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    created_at: String,
    #[serde(flatten)]
    more: Map<String, Value>,
}

#[derive(Serialize, Deserialize)]
struct KeyFields {
    #[serde(rename = "_id")]
    hash: String,
    org: OrgId,
    user: String,
    expires_at: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    created_at: String,
    #[serde(flatten)]
    more: Map<String, Value>,
}

fn first_generation() -> u32 {
    1
}

impl Record {
    /// A new document for `tenant`, made now.
    pub fn new(tenant: Tenant) -> Self {
        Self { tenant, created_at: date::format(SystemTime::now()), more: Map::new() }
    }

    /// What it says of its deletion; `None` where it says nothing, or nothing that can be read.
    pub fn deletion(&self) -> Option<Deletion> {
        serde_json::from_value(self.more.get(DELETION)?.clone()).ok()
    }

    /// What it says of the home that its SQL databases have left; as [`Self::deletion`].
    pub fn kept(&self) -> Option<Kept> {
        serde_json::from_value(self.more.get(KEPT)?.clone()).ok()
    }

    /// Parses the document of `org`.
    ///
    /// # Errors
    /// What is wrong, without a word of the content.
    pub(super) fn parse(bytes: &[u8], org: &OrgId) -> Result<Self, String> {
        Self::checked(serde_json::from_slice(bytes).map_err(|error| words(&error))?, org)
    }

    /// The same from a value.
    pub(super) fn from_value(value: Value, org: &OrgId) -> Result<Self, String> {
        Self::checked(serde_json::from_value(value).map_err(|error| words(&error))?, org)
    }

    fn checked(fields: OrgFields, org: &OrgId) -> Result<Self, String> {
        if fields.org != *org {
            return Err("its _id is not the name it is kept under".to_owned());
        }
        let OrgFields { org, tier, status, epoch, generation, databases, users, routes, created_at, more } = fields;
        let names = [&databases, &users];
        if names.iter().any(|names| names.len() > NAMES_MAX || !names.iter().all(|name| is_name(name))) {
            return Err("databases and users hold names of 1 to 63 bytes, at most 256 each".to_owned());
        }
        let still = more.get(STAMP).and_then(|stamp| stamp.get("still")) == Some(&Value::Bool(true));
        let tenant = Tenant { org, tier, status, epoch, generation, databases, users, routes, still };
        Ok(Self { tenant, created_at, more })
    }

    /// Gives the document as text, one field a line.
    pub(super) fn to_json(&self) -> Vec<u8> {
        let tenant = self.tenant.clone();
        pretty(&OrgFields {
            org: tenant.org,
            tier: tenant.tier,
            status: tenant.status,
            epoch: tenant.epoch,
            generation: tenant.generation,
            databases: tenant.databases,
            users: tenant.users,
            routes: tenant.routes,
            created_at: self.created_at.clone(),
            more: self.more.clone(),
        })
    }

    /// This document as the successor of `present`: what only that one knows is kept.
    pub(super) fn over(mut self, present: Record) -> Self {
        // Only the ledger says where a transition stands: this writer may have read before it began.
        self.more.remove(STAMP);
        self.more.remove(DELETION);
        self.more.remove(KEPT);
        for (name, value) in present.more {
            self.more.entry(name).or_insert(value);
        }
        if !present.created_at.is_empty() {
            self.created_at = present.created_at;
        }
        self
    }
}

impl KeyRecord {
    /// A new document for `key`, made now.
    pub fn new(key: ServiceKey) -> Self {
        Self { key, created_at: date::format(SystemTime::now()), more: Map::new() }
    }

    /// Parses the document of the key with this hash.
    ///
    /// # Errors
    /// What is wrong, without a word of the content.
    pub(super) fn parse(bytes: &[u8], hash: &KeyHash) -> Result<Self, String> {
        Self::checked(serde_json::from_slice(bytes).map_err(|error| words(&error))?, hash)
    }

    /// The same from a value.
    pub(super) fn from_value(value: Value, hash: &KeyHash) -> Result<Self, String> {
        Self::checked(serde_json::from_value(value).map_err(|error| words(&error))?, hash)
    }

    fn checked(fields: KeyFields, hash: &KeyHash) -> Result<Self, String> {
        if fields.hash != hex(hash) {
            return Err("its _id is not the name it is kept under".to_owned());
        }
        if !is_name(&fields.user) {
            return Err("user is not a name of 1 to 63 bytes".to_owned());
        }
        let expires_at = match fields.expires_at.as_deref().map(date::parse) {
            Some(None) => return Err("expires_at is not a date such as 2026-11-23T21:00:00Z".to_owned()),
            Some(at) => at,
            None => None,
        };
        let key = ServiceKey { hash: *hash, org: fields.org, user: fields.user, expires_at };
        Ok(Self { key, created_at: fields.created_at, more: fields.more })
    }

    /// Gives the document as text, one field a line.
    pub(super) fn to_json(&self) -> Vec<u8> {
        pretty(&KeyFields {
            hash: hex(&self.key.hash),
            org: self.key.org.clone(),
            user: self.key.user.clone(),
            expires_at: self.key.expires_at.map(date::format),
            created_at: self.created_at.clone(),
            more: self.more.clone(),
        })
    }
}

/// The name under which a key is kept.
pub(super) fn hex(hash: &KeyHash) -> String {
    data_encoding::HEXLOWER.encode(hash)
}

/// The reverse of [`hex`].
pub(super) fn unhex(text: &str) -> Option<KeyHash> {
    data_encoding::HEXLOWER.decode(text.as_bytes()).ok()?.try_into().ok()
}

fn is_name(name: &str) -> bool {
    (1..=NAME_MAX_BYTES).contains(&name.len()) && !name.contains(char::is_control)
}

fn pretty(fields: &impl Serialize) -> Vec<u8> {
    // Strings, numbers and maps with string keys always have a JSON form.
    let mut text = serde_json::to_vec_pretty(fields).unwrap_or_default();
    text.push(b'\n');
    text
}

/// The parser's own words may quote the content.
fn words(error: &serde_json::Error) -> String {
    let what = match error.classify() {
        Category::Syntax => "not JSON",
        Category::Eof => "it breaks off",
        Category::Data | Category::Io => "a field is missing, unknown in its value, or of the wrong type",
    };
    match error.line() {
        0 => what.to_owned(),
        line => format!("{what} (line {line})"),
    }
}
