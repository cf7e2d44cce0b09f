//! What a developer and a test harness want to know once everything accepts.

use std::{io::ErrorKind, path::Path};

use serde_json::{Value, json};

use super::{Ports, folder::write_private};
use crate::{
    catalog,
    tenant::{OrgId, Tier},
};

/// A demo tenant.
pub struct Demo {
    /// Its organisation.
    pub org: OrgId,
    /// Its tier now.
    pub tier: Tier,
    /// A fresh token.
    pub token: String,
    /// Its service key.
    pub service_key: String,
    /// Operations that its tier runs on MongoDB at a time.
    pub mongodb_connections: u32,
}

/// Everything there is.
pub struct Ready {
    /// The listeners' ports.
    pub ports: Ports,
    /// Opens the admin port.
    pub admin_token: String,
    /// The administrator's URL, past the proxy.
    pub postgres_url: String,
    /// The same for Redis.
    pub redis_url: String,
    /// And for MongoDB.
    pub mongodb_url: String,
    /// Convex, if it is there: the shared deployment, and what else is known of the double.
    pub convex: Option<(String, Option<Value>)>,
    /// The demo tenants.
    pub tenants: Vec<Demo>,
}

impl Ready {
    /// For people.
    pub fn table(&self) -> String {
        let mut text = String::from("\ndynabase is ready. Paste one of these; the tokens hold for 24 hours.\n");
        for demo in &self.tenants {
            text.push_str(&format!(
                "\n  {} ({})\n    psql '{}'\n    redis-cli -u '{}'\n    mongosh '{}&maxPoolSize={}'\n    neon         {}\n    {}\n{}    service key  {}\n",
                demo.org,
                demo.tier,
                self.postgres(demo),
                self.redis(demo),
                self.mongodb(demo),
                // For programs that it is pasted into: more sockets would only wait for their turn.
                demo.mongodb_connections,
                self.neon(demo),
                self.curl(demo),
                self.convex(demo),
                demo.service_key
            ));
        }
        text.push_str(&format!(
            "\n  admin        {}  (Authorization: Bearer {})\n  PostgreSQL   {}\n  Redis        {}\n  MongoDB      {}\n  catalog      database {} there\n\nCtrl-C ends everything.",
            self.admin_url(),
            self.admin_token,
            self.postgres_url,
            self.redis_url,
            self.mongodb_url,
            catalog::DATABASE,
        ));
        text
    }

    /// For programs: written whole or not at all, for its owner only.
    pub fn write(&self, path: &Path) -> Result<(), String> {
        write_private(path, format!("{:#}\n", self.json()).as_bytes())
    }

    fn json(&self) -> Value {
        let tenants: Vec<Value> = self
            .tenants
            .iter()
            .map(|demo| {
                json!({
                    "org_id": demo.org,
                    "tier": demo.tier,
                    "token": demo.token,
                    "service_key": demo.service_key,
                    "urls": {
                        "postgres": self.postgres(demo), "redis": self.redis(demo), "mongodb": self.mongodb(demo),
                        "neon": self.neon(demo),
                    },
                })
            })
            .collect();
        let mut json = json!({
            "pid": std::process::id(),
            "ports": {
                "postgres": self.ports.postgres, "redis": self.ports.redis, "mongodb": self.ports.mongodb,
                "http": self.ports.http, "admin": self.ports.admin,
            },
            "admin": {"url": self.admin_url(), "token": self.admin_token},
            "upstreams": {
                "postgres": self.postgres_url, "redis": self.redis_url, "mongodb": self.mongodb_url,
                "neon": self.postgres_url,
            },
            "catalog": {"kind": "mongodb", "url": self.mongodb_url, "database": catalog::DATABASE},
            "tenants": tenants,
        });
        if let Some((url, double)) = &self.convex {
            json["ports"]["http"] = self.ports.http.into();
            json["upstreams"]["convex"] = url.as_str().into();
            json["convex"] = double.clone().unwrap_or_default();
            for tenant in json["tenants"].as_array_mut().into_iter().flatten() {
                tenant["urls"]["convex"] = self.http().into();
            }
        }
        json
    }

    /// How a Convex client is made in a few words: its address takes no token.
    fn convex(&self, demo: &Demo) -> String {
        match &self.convex {
            Some(_) => format!("    new ConvexHttpClient(\"{}\", {{ auth: \"{}\" }})\n", self.http(), demo.token),
            None => String::new(),
        }
    }

    fn http(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports.http)
    }

    fn postgres(&self, demo: &Demo) -> String {
        format!("postgres://app:{}@127.0.0.1:{}/app", demo.token, self.ports.postgres)
    }

    fn redis(&self, demo: &Demo) -> String {
        format!("redis://app:{}@127.0.0.1:{}/0", demo.token, self.ports.redis)
    }

    fn mongodb(&self, demo: &Demo) -> String {
        let (token, port) = (&demo.token, self.ports.mongodb);
        format!("mongodb://app:{token}@127.0.0.1:{port}/app?authMechanism=PLAIN&directConnection=true")
    }

    /// Over WebSocket as it is; over HTTP with the driver's `fetchEndpoint`.
    fn neon(&self, demo: &Demo) -> String {
        format!("postgres://app:{}@127.0.0.1:{}/app", demo.token, self.ports.http)
    }

    fn curl(&self, demo: &Demo) -> String {
        format!(
            "curl http://127.0.0.1:{}/sql -H 'Neon-Connection-String: {}' -d '{{\"query\":\"select 1 as one\"}}'",
            self.ports.http,
            self.neon(demo)
        )
    }

    fn admin_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports.admin)
    }
}

/// Removes the file of an earlier run.
pub fn remove(path: &Path) -> Result<(), String> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(format!("{}: {error}", path.display())),
        _ => Ok(()),
    }
}
