//! The API's JSON, as far as it is used here. Fields that are not named are ignored: the API grows.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What a compute is like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Compute {
    /// Smallest size in compute units.
    #[serde(rename = "autoscaling_limit_min_cu")]
    pub min_cu: f64,
    /// Largest size in compute units.
    #[serde(rename = "autoscaling_limit_max_cu")]
    pub max_cu: f64,
    /// Seconds without activity after which it sleeps; −1 is never.
    pub suspend_timeout_seconds: i64,
}

impl Compute {
    /// From a tier's numbers.
    pub fn new(min_cu_hundredths: u32, max_cu_hundredths: u32, suspend_after: Option<Duration>) -> Self {
        Self {
            min_cu: f64::from(min_cu_hundredths) / 100.0,
            max_cu: f64::from(max_cu_hundredths) / 100.0,
            suspend_timeout_seconds: suspend_after
                .map_or(-1, |after| i64::try_from(after.as_secs()).unwrap_or(i64::MAX)),
        }
    }
}

/// What a project may use; 0 is without limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Quota {
    /// Bytes of one branch.
    pub logical_size_bytes: u64,
    /// Compute units times seconds in a billing period.
    pub compute_time_seconds: u64,
    /// Bytes sent to clients in a billing period.
    pub data_transfer_bytes: u64,
}

/// A project to make.
#[derive(Clone, Debug, PartialEq)]
pub struct NewProject {
    /// Its name, by which it is found again.
    pub name: String,
    /// The organisation at Neon that it belongs to.
    pub org_id: Option<String>,
    /// Where it is: `aws-eu-central-1`.
    pub region_id: Option<String>,
    /// The major version of PostgreSQL.
    pub pg_version: u32,
    /// The role that owns its first database, and that.
    pub role: String,
    /// The first database.
    pub database: String,
    /// Its computes.
    pub compute: Compute,
    /// What it may use.
    pub quota: Quota,
}

impl NewProject {
    pub(super) fn body(&self) -> Value {
        let mut project = json!({
            "name": self.name,
            "pg_version": self.pg_version,
            "branch": {"role_name": self.role, "database_name": self.database},
            "default_endpoint_settings": self.compute,
            "settings": {"quota": self.quota},
        });
        for (key, value) in [("org_id", &self.org_id), ("region_id", &self.region_id)] {
            if let Some(value) = value {
                project[key] = json!(value);
            }
        }
        json!({ "project": project })
    }
}

/// A project.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Project {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its settings.
    #[serde(default)]
    pub settings: Settings,
    /// What it has used in this billing period.
    #[serde(flatten)]
    pub usage: Usage,
}

/// A project's settings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// What it may use.
    pub quota: Quota,
}

/// What a project has used in this billing period. It lags by up to an hour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// Compute units times seconds.
    pub compute_time_seconds: u64,
    /// Bytes sent to clients.
    pub data_transfer_bytes: u64,
    /// Bytes written.
    pub written_data_bytes: u64,
    /// Bytes stored, history included.
    pub synthetic_storage_size: u64,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Endpoint {
    /// Its id.
    pub id: String,
    /// Its host.
    pub host: String,
    /// The branch that it serves.
    pub branch_id: String,
    /// `read_write` or `read_only`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `init`, `active` or `idle`.
    #[serde(default)]
    pub current_state: String,
    /// Its compute.
    #[serde(flatten)]
    pub compute: Compute,
}

/// A branch.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Branch {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes in it; absent before the first measurement.
    #[serde(default)]
    pub logical_size: Option<u64>,
}

/// Something that Neon does in its own time.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Operation {
    /// Its id.
    pub id: String,
    /// What it does.
    #[serde(default)]
    pub action: String,
    /// `scheduling running finished failed error cancelling cancelled skipped`.
    pub status: String,
}

impl Operation {
    /// Whether it is over and nothing is wrong.
    pub fn is_done(&self) -> bool {
        matches!(self.status.as_str(), "finished" | "skipped" | "cancelled")
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.is_done() || self.status == "error"
    }
}

/// A project and what of it a connection needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    /// The project.
    pub project: Project,
    /// The id of its first branch.
    pub branch: String,
    /// The endpoint that serves it.
    pub endpoint: Endpoint,
}

#[derive(Deserialize)]
pub(super) struct CreatedProject {
    pub(super) project: Project,
    pub(super) branch: Branch,
    pub(super) endpoints: Vec<Endpoint>,
    #[serde(default)]
    pub(super) operations: Vec<Operation>,
}

#[derive(Deserialize)]
pub(super) struct CreatedBranch {
    pub(super) branch: Branch,
    #[serde(default)]
    pub(super) endpoints: Vec<Endpoint>,
    #[serde(default)]
    pub(super) operations: Vec<Operation>,
}

#[derive(Deserialize)]
pub(super) struct Projects {
    pub(super) projects: Vec<Project>,
    pub(super) pagination: Option<Pagination>,
}

#[derive(Deserialize)]
pub(super) struct Pagination {
    pub(super) cursor: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct OneProject {
    pub(super) project: Project,
}

#[derive(Deserialize)]
pub(super) struct Endpoints {
    pub(super) endpoints: Vec<Endpoint>,
}

#[derive(Deserialize)]
pub(super) struct Branches {
    pub(super) branches: Vec<Branch>,
}

#[derive(Deserialize)]
pub(super) struct Operations {
    pub(super) operations: Vec<Operation>,
}

#[derive(Deserialize)]
pub(super) struct OneOperation {
    pub(super) operation: Operation,
}

#[derive(Deserialize)]
pub(super) struct RolePassword {
    pub(super) password: String,
}

/// The reply to what changes or removes something.
#[derive(Deserialize)]
pub(super) struct Done {
    #[serde(default)]
    pub(super) operations: Vec<Operation>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Fault {
    pub(super) code: String,
    pub(super) message: String,
}
