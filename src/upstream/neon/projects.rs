//! A project at Neon for each tenant: made, found again, sized, measured and removed through the management API; inside
//! it the tenant's own confined role and databases, which the project's owner makes over SQL.
//!
//! # Invariants
//! - A project is named after the tenant's role, so that it is found again when nobody knows what became of a request.
//! - A tenant never gets the owner's login: it could make roles, lift its limits and let others in.
//! - What a client's connection needs (host, role, password) is in the tenant's record or derived: nothing here is on
//!   a client's path, but the end of a backend that swallows cancels.
//!
//! Entry points: [`Projects::ensure`], [`Projects::remove`], [`at_branch`].

use std::{fmt, net::SocketAddr, time::Duration};

use super::api::{Api, ApiError, Compute, Endpoint, NewProject, Quota};
use crate::{
    net::tls::TlsMode,
    tenant::{Branch, DEFAULT_NAME, Limits, Names, NeonRoute, Project, Protocol, Tenant, namespace::Password},
    upstream::postgres::{Address, Admin, Ceiling, Maintenance, Mark, ProvisionError, Provisioner, Report, Target},
};

/// The owner of a project and its own database, where no tenant has business.
const OWNER: &str = "dynabase";

/// The port of every endpoint.
const PORT: u16 = 5432;

/// What takes the place of a host until there is one.
const NO_HOST: &str = "unknown.invalid";

/// Neon's own time before a compute sleeps, which it also says as 0.
const SUSPEND_DEFAULT_SECONDS: i64 = 300;

/// What all projects have in common.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The organisation at Neon that they belong to.
    pub org_id: Option<String>,
    /// Where they are.
    pub region: Option<String>,
    /// The major version of PostgreSQL.
    pub pg_version: u32,
    /// How endpoints are spoken to.
    pub tls: TlsMode,
    /// Authorities to trust; unset: the system's.
    pub ca_file: Option<std::path::PathBuf>,
    /// Longest time for one connection.
    pub connect_timeout: Duration,
    /// Dialled instead of endpoints' own addresses.
    pub through: Option<SocketAddr>,
}

/// Why something about a project could not be done. Calling again continues.
#[derive(Debug)]
pub enum ProjectError {
    /// The management API.
    Api(ApiError),
    /// The server inside.
    Server(ProvisionError),
    /// The tenant's record names no project.
    NoProject,
}

impl fmt::Display for ProjectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProjectError::Api(error) => error.fmt(f),
            ProjectError::Server(error) => error.fmt(f),
            ProjectError::NoProject => {
                f.write_str("the tenant's record names no project at Neon: `dynabase tenant provision` makes one")
            }
        }
    }
}

impl std::error::Error for ProjectError {}

impl From<ApiError> for ProjectError {
    fn from(error: ApiError) -> Self {
        ProjectError::Api(error)
    }
}

impl From<ProvisionError> for ProjectError {
    fn from(error: ProvisionError) -> Self {
        ProjectError::Server(error)
    }
}

/// What a project and its computes are set to, as far as a tier decides it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sizes {
    /// Bytes that one branch may hold.
    pub logical_size_bytes: u64,
    /// Its computes.
    pub compute: Compute,
}

impl Sizes {
    /// What a tier asks for.
    pub fn of(limits: &Limits) -> Self {
        let neon = &limits.neon;
        let compute = Compute::new(neon.min_cu_hundredths, neon.max_cu_hundredths, neon.suspend_after);
        Self { logical_size_bytes: neon.storage, compute }
    }
}

/// The place of a logical database: its name there, and the project or branch; `None` where the tenant's record has
/// no such place.
pub fn at_branch<'t>(tenant: &'t Tenant, database: &'t str) -> Option<(&'t str, &'t Project)> {
    let route = &tenant.routes.neon;
    let main = route.project.as_ref()?;
    match database.rsplit_once('@') {
        // A name of its own with the sign in it comes first, as everywhere.
        Some((inside, branch)) if !tenant.has_database(database) => {
            Some((inside, route.branch(branch)?.place.as_ref()?))
        }
        _ => Some((database, main)),
    }
}

/// Makes, finds, changes and removes tenants' projects.
#[derive(Debug)]
pub struct Projects {
    api: Api,
    names: Names,
    settings: Settings,
    /// Carries the TLS settings to every host.
    target: Target,
}

impl Projects {
    /// Projects of the account behind `api`.
    ///
    /// # Errors
    /// Authorities that can't be used.
    pub fn new(api: Api, names: Names, settings: Settings) -> Result<Self, String> {
        let address = Address::Tcp { host: NO_HOST.into(), port: PORT };
        let target = Target::new(address, settings.tls, settings.ca_file.clone(), settings.connect_timeout)
            .map_err(|error| error.to_string())?
            .through(settings.through);
        Ok(Self { api, names, settings, target })
    }

    /// The management API.
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// How an endpoint is dialled.
    pub fn target(&self, host: &str) -> Target {
        self.target.at(host, PORT)
    }

    fn role(&self, tenant: &Tenant) -> String {
        self.names.sql(Protocol::Neon, &tenant.org, DEFAULT_NAME).role
    }

    /// Brings the tenant's project, its role, databases and sizes to what its tier asks for; makes what is missing.
    /// Gives where they are, for its record.
    ///
    /// # Errors
    /// The first step that failed.
    ///
    /// # Cancel safety
    /// May be dropped at any point: what was done stays, a later call does the rest.
    pub async fn ensure(&self, tenant: &Tenant, limits: &Limits) -> Result<(NeonRoute, Report), ProjectError> {
        let sizes = Sizes::of(limits);
        let wanted = NewProject {
            name: self.role(tenant),
            org_id: self.settings.org_id.clone(),
            region_id: self.settings.region.clone(),
            pg_version: self.settings.pg_version,
            role: OWNER.into(),
            database: OWNER.into(),
            compute: sizes.compute,
            quota: Quota { logical_size_bytes: sizes.logical_size_bytes, ..Quota::default() },
        };
        let made = self.api.ensure_project(&wanted).await?;
        let project =
            Project { id: made.project.id, branch: made.branch, endpoint: made.endpoint.id, host: made.endpoint.host };
        let mut route = NeonRoute { project: Some(project.clone()), branches: tenant.routes.neon.branches.clone() };
        // A branch that a command of before made and could not record any more is found by its name.
        for branch in route.branches.iter_mut().filter(|branch| branch.place.is_none()) {
            branch.place = Some(self.branch_place(&project, &branch.name, sizes.compute).await?);
        }
        self.size(&project, sizes).await?;
        let report = self.provisioner(&project).await?.ensure(tenant, &self.names, limits.sql(Protocol::Neon)).await?;
        for place in route.branches.iter().filter_map(|branch| branch.place.as_ref()) {
            self.provisioner(place).await?.ensure(tenant, &self.names, limits.sql(Protocol::Neon)).await?;
        }
        Ok((route, report))
    }

    /// Brings a tenant's recorded project to its tier.
    ///
    /// # Errors
    /// As [`Self::ensure`]; [`ProjectError::NoProject`].
    pub async fn settle(&self, tenant: &Tenant, limits: &Limits) -> Result<(), ProjectError> {
        let places: Vec<&Project> = self.places(tenant)?;
        self.size(places[0], Sizes::of(limits)).await?;
        for place in places {
            self.provisioner(place).await?.ensure(tenant, &self.names, limits.sql(Protocol::Neon)).await?;
        }
        Ok(())
    }

    /// The project and its branches; the project first.
    fn places<'t>(&self, tenant: &'t Tenant) -> Result<Vec<&'t Project>, ProjectError> {
        let route = &tenant.routes.neon;
        let main = route.project.as_ref().ok_or(ProjectError::NoProject)?;
        Ok(std::iter::once(main).chain(route.branches.iter().filter_map(|it| it.place.as_ref())).collect())
    }

    /// Removes the tenant's project with all its branches. One that is gone already is removed.
    ///
    /// # Errors
    /// What the API says.
    pub async fn remove(&self, tenant: &Tenant) -> Result<(), ProjectError> {
        let recorded = tenant.routes.neon.project.as_ref().map(|project| project.id.clone());
        if let Some(id) = recorded {
            self.api.delete_project(&id).await?;
        }
        // Also one that a command of before made and could not record any more.
        match self.api.find_project(&self.role(tenant)).await? {
            Some(found) => Ok(self.api.delete_project(&found.id).await?),
            None => Ok(()),
        }
    }

    /// Makes a branch of the tenant's project as it is now; what an earlier attempt left must not pass for that.
    ///
    /// # Errors
    /// What the API says.
    pub async fn make_branch(&self, tenant: &Tenant, limits: &Limits, name: &str) -> Result<Project, ProjectError> {
        self.drop_branch(tenant, &Branch { name: name.to_owned(), place: None }).await?;
        let main = tenant.routes.neon.project.as_ref().ok_or(ProjectError::NoProject)?;
        self.branch_place(main, name, Sizes::of(limits).compute).await
    }

    async fn branch_place(&self, main: &Project, name: &str, compute: Compute) -> Result<Project, ProjectError> {
        let (branch, endpoint) = self.api.ensure_branch(&main.id, &main.branch, name, compute).await?;
        Ok(Project { id: main.id.clone(), branch: branch.id, endpoint: endpoint.id, host: endpoint.host })
    }

    /// Removes a branch with its compute; one that is gone already is removed.
    ///
    /// # Errors
    /// What the API says.
    pub async fn drop_branch(&self, tenant: &Tenant, branch: &Branch) -> Result<(), ProjectError> {
        let main = tenant.routes.neon.project.as_ref().ok_or(ProjectError::NoProject)?;
        let id = match &branch.place {
            Some(place) => Some(place.branch.clone()),
            None => {
                let found = self.api.branches(&main.id).await?;
                found.into_iter().find(|it| it.name == branch.name && it.id != main.branch).map(|it| it.id)
            }
        };
        match id {
            Some(id) => Ok(self.api.delete_branch(&main.id, &id).await?),
            None => Ok(()),
        }
    }

    /// Bytes in all branches, as Neon measured them last. Wakes no compute.
    ///
    /// # Errors
    /// What the API says.
    pub async fn bytes(&self, tenant: &Tenant) -> Result<u64, ProjectError> {
        let main = tenant.routes.neon.project.as_ref().ok_or(ProjectError::NoProject)?;
        let branches = self.api.branches(&main.id).await?;
        Ok(branches.iter().filter_map(|branch| branch.logical_size).sum())
    }

    /// What the project is set to: its computes all alike, else those of the first that differs from the rest.
    ///
    /// # Errors
    /// What the API says.
    pub async fn sizes(&self, tenant: &Tenant, wanted: &Sizes) -> Result<Sizes, ProjectError> {
        let main = tenant.routes.neon.project.as_ref().ok_or(ProjectError::NoProject)?;
        let project = self.api.project(&main.id).await?;
        let endpoints = self.computes(main).await?;
        let odd = endpoints.iter().find(|it| it.compute != wanted.compute).or(endpoints.first());
        let compute = odd.ok_or(ApiError::Reply("no endpoint"))?.compute;
        Ok(Sizes { logical_size_bytes: project.settings.quota.logical_size_bytes, compute })
    }

    /// Sets quota and computes, as far as they are not so yet: a compute that runs restarts when its size changes.
    ///
    /// # Errors
    /// What the API says.
    pub async fn size(&self, main: &Project, wanted: Sizes) -> Result<(), ProjectError> {
        let quota = self.api.project(&main.id).await?.settings.quota;
        // The other quotas are the operator's own.
        let wanted_quota = Quota { logical_size_bytes: wanted.logical_size_bytes, ..quota };
        if quota != wanted_quota {
            self.api.set_quota(&main.id, wanted_quota, wanted.compute).await?;
        }
        for endpoint in self.computes(main).await? {
            if endpoint.compute != wanted.compute {
                self.api.set_compute(&main.id, &endpoint.id, wanted.compute).await?;
            }
        }
        Ok(())
    }

    async fn computes(&self, main: &Project) -> Result<Vec<Endpoint>, ProjectError> {
        let mut endpoints = self.api.endpoints(&main.id).await?;
        for endpoint in &mut endpoints {
            if endpoint.compute.suspend_timeout_seconds == 0 {
                endpoint.compute.suspend_timeout_seconds = SUSPEND_DEFAULT_SECONDS;
            }
        }
        Ok(endpoints)
    }

    /// What the tenant's role carries: in the project, or in the first branch where it is not `wanted`.
    ///
    /// # Errors
    /// What the API or the server says.
    pub async fn ceiling(&self, tenant: &Tenant, wanted: &Ceiling) -> Result<Option<Ceiling>, ProjectError> {
        let role = self.role(tenant);
        let mut first = None;
        for (at, place) in self.places(tenant)?.into_iter().enumerate() {
            let found = self.provisioner(place).await?.ceiling(&role).await?.map(|(ceiling, _)| ceiling);
            if !found.as_ref().is_some_and(|found| found.is(wanted)) {
                return Ok(found);
            }
            if at == 0 {
                first = found;
            }
        }
        Ok(first)
    }

    /// Sets what the tenant's role carries in the project and its branches; not where somebody newer than `mark` has.
    /// Says whether it did.
    ///
    /// # Errors
    /// What the API or the server says.
    pub async fn set_ceiling(&self, tenant: &Tenant, ceiling: &Ceiling, mark: Mark) -> Result<bool, ProjectError> {
        let role = self.role(tenant);
        for place in self.places(tenant)? {
            if !self.provisioner(place).await?.set_ceiling(&role, ceiling, mark).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Gives the tenant's role the password of a generation, in the project and its branches.
    ///
    /// # Errors
    /// What the API or the server says; calling again continues.
    pub async fn set_password(&self, tenant: &Tenant, generation: u32) -> Result<(), ProjectError> {
        for place in self.places(tenant)? {
            self.provisioner(place).await?.set_password(tenant, &self.names, generation).await?;
        }
        Ok(())
    }

    /// The tenant's project, if it is there: its name, its branches and their bytes.
    ///
    /// # Errors
    /// What the API says.
    pub async fn holdings(&self, tenant: &Tenant) -> Result<Option<(String, usize, u64)>, ProjectError> {
        let Some(project) = self.api.find_project(&self.role(tenant)).await? else { return Ok(None) };
        let branches = self.api.branches(&project.id).await?;
        let bytes = branches.iter().filter_map(|branch| branch.logical_size).sum();
        Ok(Some((project.name, branches.len(), bytes)))
    }

    /// Ends a backend of `role`; says whether there was one.
    pub async fn terminate(&self, place: &Project, pid: i32, role: &str) -> bool {
        match self.admin(place).await {
            Ok(admin) => Maintenance::new(admin).terminate(pid, role).await.unwrap_or(false),
            Err(_) => false,
        }
    }

    /// What works with the owner's login in the tenant's project.
    ///
    /// # Errors
    /// What the API says; [`ProjectError::NoProject`].
    pub async fn main(&self, tenant: &Tenant) -> Result<Provisioner, ProjectError> {
        self.provisioner(tenant.routes.neon.project.as_ref().ok_or(ProjectError::NoProject)?).await
    }

    /// What works with the owner's login in one place.
    async fn provisioner(&self, place: &Project) -> Result<Provisioner, ProjectError> {
        Ok(Provisioner::of_project(self.admin(place).await?))
    }

    /// The owner's login. Its password is Neon's to keep: it is asked for each time, and kept nowhere.
    async fn admin(&self, place: &Project) -> Result<Admin, ProjectError> {
        let password: Password = self.api.password(&place.id, &place.branch, OWNER).await?;
        Ok(Admin::of(self.target(&place.host), OWNER, &password, OWNER))
    }
}
