//! Every command of the server: who may use it, where its names and filters stand, what its reply carries.
//!
//! A command that has no row is unknown to clients (59), and so is a field that its row does not name (40415): a
//! server that learns a new field does not teach it to tenants. Both isolations share a row's fields; what
//! [`Rule`] does with one differs. Internal commands (`_…`) are refused as a class.
//!
//! In `filter` isolation the commands that would touch a shared collection as a whole (`drop`, `dropDatabase`,
//! `listCollections`, …) are emulated on the tenant's own documents, so that one application runs in both.

/// What a row says about the place of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// One of the tenant's databases.
    Data,
    /// `admin`, and it stays `admin`.
    Admin,
    /// A database of the tenant's, or `admin` for the cursors of `bulkWrite`.
    Cursor,
}

/// What a command's first element holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// A collection's name.
    Collection,
    /// A collection's name, or 1 for the database itself.
    CollectionOrDatabase,
    /// Nothing that matters.
    Anything,
    /// `database.collection`.
    Namespace,
    /// A cursor id.
    Cursor,
    /// Session ids.
    Sessions,
    /// A command.
    Command,
}

/// What becomes of a command in one isolation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treat {
    /// Rewritten by its fields and sent on.
    Forward,
    /// Answered by the front.
    Local(Emulate),
    /// Not for tenants: 13.
    Refuse,
}

/// What the front answers itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Emulate {
    /// `hello`, `isMaster`.
    Hello,
    /// `saslStart`, `saslContinue`.
    Sasl,
    /// `logout`.
    Logout,
    /// `ping`.
    Ping,
    /// `buildInfo`.
    BuildInfo,
    /// `connectionStatus`.
    ConnectionStatus,
    /// `whatsmyuri`.
    WhatsMyUri,
    /// `listCommands`.
    ListCommands,
    /// `getDefaultRWConcern`.
    DefaultConcern,
    /// `getParameter`.
    Parameter,
    /// `getCmdLineOpts`.
    CommandLine,
    /// `getLog`.
    Log,
    /// `hostInfo`.
    HostInfo,
    /// `serverStatus`.
    ServerStatus,
    /// `usersInfo`: oneself.
    UsersInfo,
    /// `listDatabases`: the logical ones.
    ListDatabases,
    /// `listCollections` of `filter`: those that hold a document of the tenant.
    ListCollections,
    /// `drop` of `filter`: the tenant's documents and indexes go.
    Drop,
    /// `dropDatabase` of `filter`: [`Emulate::Drop`] for each collection.
    DropDatabase,
    /// `dropIndexes` of `filter` by key or `*`: the tenant's indexes that match.
    DropIndexes,
    /// `collStats` of `filter`: the number of the tenant's documents.
    CollStats,
    /// `dbStats` of `filter`: the same over its collections.
    DbStats,
}

/// What in a reply has to be mapped back, beside the texts of errors, in which the physical database prefix is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReplyRule {
    /// Nothing.
    Plain,
    /// `cursor.ns` and `cursor.id`.
    Cursor,
    /// `ns`, `db`, `dropped` and the like at top level.
    Namespace,
    /// Errors of statements; [`super::rewrite::Forward::failed`] has to be merged in.
    Writes,
    /// `cursor` of `bulkWrite`.
    BulkWrite,
    /// `cursorsKilled` and its siblings.
    Killed,
    /// `id` of a new session.
    Session,
    /// Names and filters of a plan; `command` and `serverInfo` go.
    Explain,
    /// `cursor` with collections; `system.*` goes.
    Collections,
    /// `cursor` with indexes; in `filter` those of others go.
    Indexes,
    /// In `filter`, 48 (it exists) is success: another tenant may have made it.
    Created,
    /// `numIndexesBefore` and the like: in `filter` they count others' as well, and go.
    IndexesMade,
    /// The same of indexes that only make faster: in `filter`, where there is no room for another (67), it is success,
    /// as applications make theirs at each start.
    IndexesWished,
}

/// What a field of a command is: its type, and what has to be done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Anything, copied.
    Any,
    /// True or false, or a number.
    Flag,
    /// A number.
    Number,
    /// A string.
    Text,
    /// A document, copied.
    Document,
    /// An array, copied.
    Array,
    /// Refused with 13 unless it is false.
    Forbidden,
    /// Refused with 13 in `filter`, copied in `database`.
    DatabaseOnly,
    /// A filter.
    Filter,
    /// A projection.
    Projection,
    /// A sort: a document without `$natural`.
    Sort,
    /// An index: its name or its key.
    Hint,
    /// A collation.
    Collation,
    /// Variables: expressions.
    Variables,
    /// A pipeline.
    Pipeline,
    /// Documents to insert; also a section.
    Documents,
    /// Statements of `update`; also a section.
    Updates,
    /// Statements of `delete`; also a section.
    Deletes,
    /// Statements of `bulkWrite`; also a section.
    Operations,
    /// Namespaces of `bulkWrite`; also a section.
    Namespaces,
    /// The update of `findAndModify`.
    Update,
    /// The path of `distinct`.
    Path,
    /// Cursor ids.
    Cursors,
    /// The collection of a cursor.
    CursorCollection,
    /// `database.collection`, to which another is renamed.
    Target,
    /// Indexes to make.
    Indexes,
    /// Indexes to drop: names, a key, or `*`.
    IndexNames,
    /// A collection's name.
    Collection,
    /// The filter of a partial index, a validator: no JavaScript.
    Validator,
    /// The verbosity of `explain`.
    Verbosity,
    /// `collMod`'s view pipeline, `create`'s: checked, the view itself only in `database`.
    View,
}

/// A field that a command may have.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// What becomes of it.
    pub rule: Rule,
}

/// A command.
#[derive(Debug)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// Its other name, differing in case.
    pub alias: Option<&'static str>,
    /// Where it is sent to.
    pub home: Home,
    /// Its first element.
    pub value: Value,
    /// What becomes of it in `filter`.
    pub filter: Treat,
    /// What becomes of it in `database`.
    pub database: Treat,
    /// Whether the tier's time is set on it.
    pub timed: bool,
    /// What in its reply has to be mapped.
    pub reply: ReplyRule,
    /// Its own fields, beside [`GENERIC`].
    pub fields: &'static [Field],
    /// Bits of the fields without which the server would do something else than asked, or something to everybody.
    pub required: u64,
    /// Bits of the fields that `filter` isolation writes where the client left them out.
    pub wanted: u64,
    /// Fields that others depend on.
    pub bits: Bits,
}

/// The bits, by their places, of fields that are looked for by their names with each command; 0 for one that the row has
/// not. Most commands have none of them, which a bit tells without a walk over what the client wrote.
#[derive(Clone, Copy, Debug)]
pub struct Bits {
    /// `collection`.
    pub collection: u64,
    /// `collation`.
    pub collation: u64,
    /// `ordered`.
    pub ordered: u64,
    /// `upsert`.
    pub upsert: u64,
    /// `explain`.
    pub explain: u64,
}

impl Bits {
    const fn of(fields: &[Field]) -> Self {
        Self {
            collection: bit(fields, "collection"),
            collation: bit(fields, "collation"),
            ordered: bit(fields, "ordered"),
            upsert: bit(fields, "upsert"),
            explain: bit(fields, "explain"),
        }
    }
}

/// The bit of the field of that name.
const fn bit(fields: &[Field], name: &str) -> u64 {
    let mut at = 0;
    while at < fields.len() {
        if is_same(fields[at].name, name) {
            return 1 << at;
        }
        at += 1;
    }
    0
}

/// Whether two names are one, for the compiler.
pub const fn is_same(one: &str, other: &str) -> bool {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    let mut same = 0;
    while same < one.len() && same < other.len() && one[same] == other[same] {
        same += 1;
    }
    same == one.len() && same == other.len()
}

const fn field(name: &'static str, rule: Rule) -> Field {
    Field { name, rule }
}

/// Fields that every command may have. `$db` and `maxTimeMS` are written anew, `lsid` is checked.
pub const GENERIC: [&str; 15] = [
    "$db",
    "lsid",
    "txnNumber",
    "autocommit",
    "startTransaction",
    "recoveryToken",
    "readConcern",
    "writeConcern",
    "maxTimeMS",
    "comment",
    "$readPreference",
    "$clusterTime",
    "apiVersion",
    "apiStrict",
    "apiDeprecationErrors",
];

/// A row of the tenant's data, forwarded in both isolations.
const fn data(name: &'static str, value: Value, reply: ReplyRule, fields: &'static [Field]) -> Row {
    Row {
        name,
        alias: None,
        home: Home::Data,
        value,
        filter: Treat::Forward,
        database: Treat::Forward,
        timed: true,
        reply,
        fields,
        required: bits(fields, Which::Required),
        wanted: bits(fields, Which::Wanted),
        bits: Bits::of(fields),
    }
}

enum Which {
    Required,
    Wanted,
}

/// A bit for each such field, by its place.
const fn bits(fields: &[Field], which: Which) -> u64 {
    let (mut bits, mut at) = (0, 0);
    while at < fields.len() {
        let meant = match which {
            Which::Required => matches!(
                fields[at].rule,
                Rule::Documents
                    | Rule::Updates
                    | Rule::Deletes
                    | Rule::Operations
                    | Rule::Namespaces
                    | Rule::Pipeline
                    | Rule::Path
                    | Rule::Cursors
                    | Rule::CursorCollection
                    | Rule::Target
                    | Rule::Indexes
            ),
            Which::Wanted => matches!(fields[at].rule, Rule::Filter | Rule::Projection | Rule::Verbosity),
        };
        if meant {
            bits |= 1 << at;
        }
        at += 1;
    }
    bits
}

/// A row that is answered here, whatever its fields.
const fn local(name: &'static str, emulate: Emulate) -> Row {
    let treat = Treat::Local(emulate);
    Row {
        name,
        alias: None,
        home: Home::Admin,
        value: Value::Anything,
        filter: treat,
        database: treat,
        timed: false,
        reply: ReplyRule::Plain,
        fields: &[],
        required: 0,
        wanted: 0,
        bits: Bits::of(&[]),
    }
}

impl Row {
    const fn or(mut self, alias: &'static str) -> Self {
        self.alias = Some(alias);
        self
    }

    /// Whether it may leave fewer collections, or others, than there were.
    pub fn takes_away(&self) -> bool {
        matches!(self.name, "drop" | "dropDatabase" | "renameCollection")
    }

    const fn filter(mut self, treat: Treat) -> Self {
        self.filter = treat;
        self
    }

    const fn at(mut self, home: Home) -> Self {
        self.home = home;
        self
    }

    const fn untimed(mut self) -> Self {
        self.timed = false;
        self
    }
}

/// Every command that is not refused, by name.
pub static ROWS: &[Row] = &[
    data("abortTransaction", Value::Anything, ReplyRule::Plain, &[]).at(Home::Admin).untimed(),
    data(
        "aggregate",
        Value::CollectionOrDatabase,
        ReplyRule::Cursor,
        &[
            field("pipeline", Rule::Pipeline),
            field("cursor", Rule::Document),
            field("explain", Rule::Flag),
            field("allowDiskUse", Rule::Flag),
            field("bypassDocumentValidation", Rule::Flag),
            field("collation", Rule::Collation),
            field("hint", Rule::Hint),
            field("let", Rule::Variables),
        ],
    ),
    local("buildInfo", Emulate::BuildInfo).or("buildinfo"),
    data(
        "bulkWrite",
        Value::Anything,
        ReplyRule::BulkWrite,
        &[
            field("ops", Rule::Operations),
            field("nsInfo", Rule::Namespaces),
            field("ordered", Rule::Flag),
            field("errorsOnly", Rule::Flag),
            field("bypassDocumentValidation", Rule::Flag),
            field("let", Rule::Variables),
            field("cursor", Rule::Document),
        ],
    )
    .at(Home::Admin),
    data(
        "cloneCollectionAsCapped",
        Value::Collection,
        ReplyRule::Namespace,
        &[field("toCollection", Rule::Collection), field("size", Rule::Number)],
    )
    .filter(Treat::Refuse),
    data(
        "collMod",
        Value::Collection,
        ReplyRule::Namespace,
        &[
            field("index", Rule::Document),
            field("validator", Rule::Validator),
            field("validationLevel", Rule::Text),
            field("validationAction", Rule::Text),
            field("viewOn", Rule::Collection),
            field("pipeline", Rule::View),
            field("cappedSize", Rule::Number),
            field("cappedMax", Rule::Number),
            field("changeStreamPreAndPostImages", Rule::Document),
            field("expireAfterSeconds", Rule::Any),
            field("timeseries", Rule::Document),
            field("dryRun", Rule::Flag),
        ],
    )
    .filter(Treat::Refuse),
    data(
        "collStats",
        Value::Collection,
        ReplyRule::Namespace,
        &[field("scale", Rule::Number), field("freeStorage", Rule::Number)],
    )
    .or("collstats")
    .filter(Treat::Local(Emulate::CollStats)),
    data("commitTransaction", Value::Anything, ReplyRule::Plain, &[]).at(Home::Admin).untimed(),
    local("connectionStatus", Emulate::ConnectionStatus),
    data("convertToCapped", Value::Collection, ReplyRule::Namespace, &[field("size", Rule::Number)])
        .filter(Treat::Refuse),
    data(
        "count",
        Value::Collection,
        ReplyRule::Plain,
        &[
            field("query", Rule::Filter),
            field("limit", Rule::Number),
            field("skip", Rule::Number),
            field("hint", Rule::Hint),
            field("fields", Rule::Any),
            field("collation", Rule::Collation),
        ],
    ),
    data(
        "create",
        Value::Collection,
        ReplyRule::Created,
        &[
            field("capped", Rule::DatabaseOnly),
            field("autoIndexId", Rule::DatabaseOnly),
            field("size", Rule::DatabaseOnly),
            field("max", Rule::DatabaseOnly),
            field("validator", Rule::Validator),
            field("validationLevel", Rule::DatabaseOnly),
            field("validationAction", Rule::DatabaseOnly),
            field("viewOn", Rule::View),
            field("pipeline", Rule::View),
            field("collation", Rule::Collation),
            field("timeseries", Rule::DatabaseOnly),
            field("expireAfterSeconds", Rule::DatabaseOnly),
            field("clusteredIndex", Rule::DatabaseOnly),
            field("changeStreamPreAndPostImages", Rule::DatabaseOnly),
        ],
    ),
    data(
        "createIndexes",
        Value::Collection,
        ReplyRule::IndexesMade,
        &[
            field("indexes", Rule::Indexes),
            field("commitQuorum", Rule::Any),
            field("ignoreUnknownIndexOptions", Rule::Forbidden),
        ],
    ),
    data("createSearchIndexes", Value::Collection, ReplyRule::Namespace, &[field("indexes", Rule::Array)])
        .filter(Treat::Refuse),
    data(
        "dataSize",
        Value::Namespace,
        ReplyRule::Plain,
        &[
            field("keyPattern", Rule::Document),
            field("min", Rule::Document),
            field("max", Rule::Document),
            field("estimate", Rule::Flag),
        ],
    )
    .or("datasize")
    .filter(Treat::Refuse),
    data(
        "dbStats",
        Value::Anything,
        ReplyRule::Namespace,
        &[field("scale", Rule::Number), field("freeStorage", Rule::Number)],
    )
    .or("dbstats")
    .filter(Treat::Local(Emulate::DbStats)),
    data(
        "delete",
        Value::Collection,
        ReplyRule::Writes,
        &[field("deletes", Rule::Deletes), field("ordered", Rule::Flag), field("let", Rule::Variables)],
    ),
    data(
        "distinct",
        Value::Collection,
        ReplyRule::Plain,
        &[
            field("key", Rule::Path),
            field("query", Rule::Filter),
            field("collation", Rule::Collation),
            field("hint", Rule::Hint),
        ],
    ),
    data("drop", Value::Collection, ReplyRule::Namespace, &[]).filter(Treat::Local(Emulate::Drop)),
    data("dropDatabase", Value::Anything, ReplyRule::Namespace, &[]).filter(Treat::Local(Emulate::DropDatabase)),
    data("dropIndexes", Value::Collection, ReplyRule::IndexesMade, &[field("index", Rule::IndexNames)]),
    data(
        "dropSearchIndex",
        Value::Collection,
        ReplyRule::Namespace,
        &[field("name", Rule::Text), field("id", Rule::Text)],
    )
    .filter(Treat::Refuse),
    data("endSessions", Value::Sessions, ReplyRule::Plain, &[]).at(Home::Admin).untimed(),
    data("explain", Value::Command, ReplyRule::Explain, &[field("verbosity", Rule::Verbosity)]),
    data(
        "find",
        Value::Collection,
        ReplyRule::Cursor,
        &[
            field("filter", Rule::Filter),
            field("projection", Rule::Projection),
            field("sort", Rule::Sort),
            field("limit", Rule::Number),
            field("batchSize", Rule::Number),
            field("singleBatch", Rule::Flag),
            field("skip", Rule::Number),
            field("hint", Rule::Hint),
            field("max", Rule::Document),
            field("min", Rule::Document),
            field("returnKey", Rule::Flag),
            field("showRecordId", Rule::DatabaseOnly),
            field("tailable", Rule::Flag),
            field("oplogReplay", Rule::Flag),
            field("noCursorTimeout", Rule::Flag),
            field("awaitData", Rule::Flag),
            field("allowPartialResults", Rule::Flag),
            field("collation", Rule::Collation),
            field("allowDiskUse", Rule::Flag),
            field("let", Rule::Variables),
        ],
    ),
    data(
        "findAndModify",
        Value::Collection,
        ReplyRule::Plain,
        &[
            field("query", Rule::Filter),
            field("sort", Rule::Sort),
            field("remove", Rule::Flag),
            field("update", Rule::Update),
            field("new", Rule::Flag),
            field("fields", Rule::Projection),
            field("upsert", Rule::Flag),
            field("bypassDocumentValidation", Rule::Flag),
            field("collation", Rule::Collation),
            field("arrayFilters", Rule::Array),
            field("hint", Rule::Hint),
            field("let", Rule::Variables),
        ],
    )
    .or("findandmodify"),
    local("getCmdLineOpts", Emulate::CommandLine),
    local("getDefaultRWConcern", Emulate::DefaultConcern),
    local("getLog", Emulate::Log),
    data(
        "getMore",
        Value::Cursor,
        ReplyRule::Cursor,
        &[field("collection", Rule::CursorCollection), field("batchSize", Rule::Number)],
    )
    .at(Home::Cursor)
    .untimed(),
    local("getParameter", Emulate::Parameter),
    local("hello", Emulate::Hello),
    local("hostInfo", Emulate::HostInfo).or("hostinfo"),
    data(
        "insert",
        Value::Collection,
        ReplyRule::Writes,
        &[
            field("documents", Rule::Documents),
            field("ordered", Rule::Flag),
            field("bypassDocumentValidation", Rule::Flag),
        ],
    ),
    local("isMaster", Emulate::Hello).or("ismaster"),
    data("killCursors", Value::CollectionOrDatabase, ReplyRule::Killed, &[field("cursors", Rule::Cursors)])
        .at(Home::Cursor)
        .untimed(),
    data("killSessions", Value::Sessions, ReplyRule::Plain, &[]).at(Home::Admin).untimed(),
    data(
        "listCollections",
        Value::Anything,
        ReplyRule::Collections,
        &[
            field("filter", Rule::Validator),
            field("nameOnly", Rule::Flag),
            field("authorizedCollections", Rule::Flag),
            field("cursor", Rule::Document),
        ],
    )
    .filter(Treat::Local(Emulate::ListCollections)),
    local("listCommands", Emulate::ListCommands),
    local("listDatabases", Emulate::ListDatabases),
    data("listIndexes", Value::Collection, ReplyRule::Indexes, &[field("cursor", Rule::Document)]),
    local("logout", Emulate::Logout),
    local("ping", Emulate::Ping),
    data(
        "planCacheClear",
        Value::Collection,
        ReplyRule::Plain,
        &[
            field("query", Rule::Validator),
            field("projection", Rule::Document),
            field("sort", Rule::Document),
            field("collation", Rule::Collation),
        ],
    )
    .filter(Treat::Refuse),
    data("reIndex", Value::Collection, ReplyRule::Namespace, &[]).filter(Treat::Refuse),
    data("refreshSessions", Value::Sessions, ReplyRule::Plain, &[]).at(Home::Admin).untimed(),
    data(
        "renameCollection",
        Value::Namespace,
        ReplyRule::Namespace,
        &[field("to", Rule::Target), field("dropTarget", Rule::Flag)],
    )
    .at(Home::Admin)
    .filter(Treat::Refuse),
    local("saslContinue", Emulate::Sasl),
    local("saslStart", Emulate::Sasl),
    local("serverStatus", Emulate::ServerStatus),
    data("startSession", Value::Anything, ReplyRule::Session, &[]).at(Home::Admin).untimed(),
    data(
        "update",
        Value::Collection,
        ReplyRule::Writes,
        &[
            field("updates", Rule::Updates),
            field("ordered", Rule::Flag),
            field("bypassDocumentValidation", Rule::Flag),
            field("let", Rule::Variables),
        ],
    ),
    data(
        "updateSearchIndex",
        Value::Collection,
        ReplyRule::Namespace,
        &[field("name", Rule::Text), field("id", Rule::Text), field("definition", Rule::Document)],
    )
    .filter(Treat::Refuse),
    local("usersInfo", Emulate::UsersInfo),
    data(
        "validate",
        Value::Collection,
        ReplyRule::Namespace,
        &[field("full", Rule::Flag), field("checkBSONConformance", Rule::Flag)],
    )
    .filter(Treat::Refuse),
    local("whatsmyuri", Emulate::WhatsMyUri),
];

/// Commands of the server that are not for tenants: 13, and its sentence says so.
///
/// Users and roles would reach the upstream login; sharding, replication, parameters and diagnosis are the operator's;
/// JavaScript (`mapReduce`) and `filemd5` read whole collections.
pub static REFUSED: &[&str] = &[
    "abortMoveCollection",
    "abortReshardCollection",
    "abortRewriteCollection",
    "abortShardSplit",
    "abortUnshardCollection",
    "addShard",
    "addShardToZone",
    "analyze",
    "analyzeShardKey",
    "appendOplogNote",
    "applyOps",
    "authenticate",
    "autoCompact",
    "autoSplitVector",
    "balancerCollectionStatus",
    "balancerStart",
    "balancerStatus",
    "balancerStop",
    "changePrimary",
    "checkMetadataConsistency",
    "checkShardingIndex",
    "cleanupOrphaned",
    "cleanupReshardCollection",
    "cleanupStructuredEncryptionData",
    "clearJumboFlag",
    "clearLog",
    "cloneCollection",
    "clusterAbortTransaction",
    "clusterAggregate",
    "clusterBulkWrite",
    "clusterCommitTransaction",
    "clusterCount",
    "clusterDelete",
    "clusterFind",
    "clusterGetMore",
    "clusterInsert",
    "clusterUpdate",
    "commitReshardCollection",
    "commitShardRemoval",
    "commitShardSplit",
    "commitTransitionToDedicatedConfigServer",
    "compact",
    "compactStructuredEncryptionData",
    "configureCollectionBalancing",
    "configureQueryAnalyzer",
    "connPoolStats",
    "connPoolSync",
    "coordinateCommitTransaction",
    "createRole",
    "createUnsplittableCollection",
    "createUser",
    "currentOp",
    "dbCheck",
    "dbHash",
    "donorAbortMigration",
    "donorForgetMigration",
    "donorStartMigration",
    "donorWaitForMigrationToCommit",
    "driverOIDCTest",
    "dropAllRolesFromDatabase",
    "dropAllUsersFromDatabase",
    "dropConnections",
    "dropRole",
    "dropUser",
    "enableSharding",
    "exportCollection",
    "features",
    "filemd5",
    "flushRouterConfig",
    "forgetShardSplit",
    "fsync",
    "fsyncUnlock",
    "getAuditConfig",
    "getChangeStreamState",
    "getClusterParameter",
    "getDatabaseVersion",
    "getDiagnosticData",
    "getESERotateActiveKEKStatus",
    "getLastError",
    "getPrevError",
    "getQueryableEncryptionCountInfo",
    "getShardMap",
    "getShardVersion",
    "getShardingReady",
    "getTrafficRecordingStatus",
    "getTransitionToDedicatedConfigServerStatus",
    "getnonce",
    "grantPrivilegesToRole",
    "grantRolesToRole",
    "grantRolesToUser",
    "importCollection",
    "internalRenameIfOptionsAndIndexesMatch",
    "invalidateUserCache",
    "isdbgrid",
    "killAllSessions",
    "killAllSessionsByPattern",
    "killOp",
    "listDatabasesForAllTenants",
    "listSearchIndexes",
    "listShards",
    "lockInfo",
    "logApplicationMessage",
    "logMessage",
    "logRotate",
    "makeSnapshot",
    "mapReduce",
    "mapreduce",
    "mergeAllChunksOnShard",
    "mergeChunks",
    "moveChunk",
    "moveCollection",
    "movePrimary",
    "moveRange",
    "multicast",
    "netstat",
    "oidcListKeys",
    "oidcRefreshKeys",
    "pinHistoryReplicated",
    "planCacheClearFilters",
    "planCacheListFilters",
    "planCacheSetFilter",
    "prepareTransaction",
    "profile",
    "reapLogicalSessionCacheNow",
    "recipientForgetMigration",
    "recipientSyncData",
    "recipientVoteImportedFiles",
    "refineCollectionShardKey",
    "refreshLogicalSessionCacheNow",
    "releaseMemory",
    "removeQuerySettings",
    "removeShard",
    "removeShardFromZone",
    "repairDatabase",
    "repairShardedCollectionChunksHistory",
    "replSetAbortPrimaryCatchUp",
    "replSetFreeze",
    "replSetGetConfig",
    "replSetGetRBID",
    "replSetGetStatus",
    "replSetHeartbeat",
    "replSetInitiate",
    "replSetMaintenance",
    "replSetReconfig",
    "replSetRequestVotes",
    "replSetResizeOplog",
    "replSetStepDown",
    "replSetStepUp",
    "replSetSyncFrom",
    "replSetTestEgress",
    "replSetUpdatePosition",
    "resetError",
    "resetPlacementHistory",
    "reshardCollection",
    "revokePrivilegesFromRole",
    "revokeRolesFromRole",
    "revokeRolesFromUser",
    "rewriteCollection",
    "rolesInfo",
    "rotateCertificates",
    "setAllowMigrations",
    "setAuditConfig",
    "setChangeStreamState",
    "setClusterParameter",
    "setCommittedSnapshot",
    "setDefaultRWConcern",
    "setFeatureCompatibilityVersion",
    "setIndexCommitQuorum",
    "setParameter",
    "setProfilingFilterGlobally",
    "setQuerySettings",
    "setShardVersion",
    "setUserWriteBlockMode",
    "shardCollection",
    "shardConnPoolStats",
    "shardDrainingStatus",
    "shardingState",
    "shutdown",
    "split",
    "splitChunk",
    "splitVector",
    "startRecordingTraffic",
    "startShardDraining",
    "startTransitionToDedicatedConfigServer",
    "stopRecordingTraffic",
    "stopShardDraining",
    "stopTransitionToDedicatedConfigServer",
    "streams_getMetrics",
    "streams_getMoreStreamSample",
    "streams_getStats",
    "streams_listStreamProcessors",
    "streams_sendEvent",
    "streams_startStreamProcessor",
    "streams_startStreamSample",
    "streams_stopStreamProcessor",
    "streams_testOnlyGetFeatureFlags",
    "streams_testOnlyInsert",
    "streams_updateConnection",
    "streams_updateFeatureFlags",
    "streams_writeCheckpoint",
    "timeseriesCatalogBucketParamsChanged",
    "top",
    "transitionFromDedicatedConfigServer",
    "transitionToDedicatedConfigServer",
    "transitionToShardedCluster",
    "unshardCollection",
    "untrackUnshardedCollection",
    "updateRole",
    "updateUser",
    "updateZoneKeyRange",
    "upgradeDowngradeViewlessTimeseries",
    "validateDBMetadata",
    "voteAbortIndexBuild",
    "voteCommitImportCollection",
    "voteCommitIndexBuild",
    "whatsmysni",
];

/// Commands that servers have only under test flags: 59, as on a server without.
pub static TEST_ONLY: &[&str] = &[
    "captrunc",
    "configureFailPoint",
    "cpuload",
    "echo",
    "emptycapped",
    "fault",
    "godinsert",
    "httpClientRequest",
    "replSetTest",
    "sleep",
    "stageDebug",
    "sysprofile",
    "testDeprecation",
    "testDeprecationInVersion2",
    "testInternalTransactions",
    "testRemoval",
    "testReshardCloneCollection",
    "testVersion2",
    "testVersions1And2",
    "waitForFailPoint",
];

/// What the table says of a name.
#[derive(Clone, Copy, Debug)]
pub enum Found {
    /// Its row.
    Row(&'static Row),
    /// It exists and is not for tenants.
    Refused,
    /// There is no such command.
    Unknown,
}

/// Looks a command up by its exact name, as the server does.
pub fn find(name: &[u8]) -> Found {
    if let Some(row) = row(name) {
        return Found::Row(row);
    }
    let refused = name.starts_with(b"_") || REFUSED.iter().any(|refused| refused.as_bytes() == name);
    if refused { Found::Refused } else { Found::Unknown }
}

fn row(name: &[u8]) -> Option<&'static Row> {
    let mut at = place(name);
    // Ends at an empty place: there are more places than names.
    loop {
        let row = ROWS.get(usize::from(INDEX[at]))?;
        if row.name.as_bytes() == name || row.alias.is_some_and(|alias| alias.as_bytes() == name) {
            return Some(row);
        }
        at = (at + 1) % PLACES;
    }
}

/// Places in [`INDEX`].
const PLACES: usize = 256;

/// Rows by their names and aliases, made by the compiler; what is beyond all rows is an empty place. Walking sixty
/// names cost more than rewriting some commands.
static INDEX: [u8; PLACES] = {
    assert!(ROWS.len() * 2 < PLACES);
    let (mut index, mut at) = ([u8::MAX; PLACES], 0);
    while at < ROWS.len() {
        let names = [Some(ROWS[at].name), ROWS[at].alias];
        let mut which = 0;
        while which < names.len() {
            if let Some(name) = names[which] {
                let mut to = place(name.as_bytes());
                while index[to] != u8::MAX {
                    to = (to + 1) % PLACES;
                }
                #[allow(clippy::cast_possible_truncation, reason = "fewer rows than places, as asserted")]
                let row = at as u8;
                index[to] = row;
            }
            which += 1;
        }
        at += 1;
    }
    index
};

/// Where a name is looked for first.
const fn place(name: &[u8]) -> usize {
    let (mut hash, mut at) = (name.len(), 0);
    while at < name.len() && at < 32 {
        hash = hash.wrapping_mul(31).wrapping_add(name[at] as usize);
        at += 1;
    }
    (hash ^ hash >> 8) % PLACES
}
