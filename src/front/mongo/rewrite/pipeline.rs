//! Aggregation pipelines: every stage that reads or writes a collection is bound to the tenant, every other is known
//! to see only what came in.
//!
//! In `filter` the tenant's clause is merged into a first `$match` (`$text` has to stay first), into `$geoNear`, or
//! put before the rest, and `org_id` is taken off right behind it, so that no later stage knows of it. A later
//! `$match` whose `$expr` may raise an error gets a `$limit` before it that limits nothing: across it no server
//! moves a filter to where others' documents are.

use super::{
    Fault, ORG, PIPELINE_STAGES_MAX, PIPELINES_DEPTH_MAX, Prepare, Scope, change, expression, predicate,
    predicate::Collation, stage,
};
use crate::{
    tenant::Isolation,
    wire::mongo::bson::{self, Document, Element, Index},
};

/// What a pipeline reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The collection of the command.
    Collection,
    /// A collection that a stage names.
    Joined,
    /// What it states itself: `$documents` has to be first.
    Stated,
    /// The database: `$documents` or `$changeStream` has to be first.
    Database,
    /// What comes in from the stage that holds it.
    Incoming,
    /// The collection, for a stage that ranks: whole documents have to come out.
    Ranked,
    /// A view's source, in `database` only.
    View,
}

/// What a pipeline is rewritten with.
pub(super) struct Cx<'c, 'a> {
    /// Who asks.
    pub scope: &'c Scope<'c>,
    /// The logical database.
    pub database: &'a str,
    /// The collection of the command.
    pub collection: Option<&'a str>,
    /// How strings compare in all of it.
    pub collation: Collation,
    /// What it turned out to need.
    pub prepare: Option<Prepare<'a>>,
    /// The collection that it writes to, and its logical database.
    pub target: Option<(&'a str, &'a str)>,
}

/// Stages that see only what comes in.
const PLAIN: [&[u8]; 23] = [
    b"$addFields",
    b"$set",
    b"$bucket",
    b"$bucketAuto",
    b"$count",
    b"$densify",
    b"$fill",
    b"$group",
    b"$limit",
    b"$project",
    b"$redact",
    b"$replaceRoot",
    b"$replaceWith",
    b"$sample",
    b"$score",
    b"$setWindowFields",
    b"$skip",
    b"$sort",
    b"$sortByCount",
    b"$unset",
    b"$unwind",
    b"$minhash",
    b"$changeStreamSplitLargeEvent",
];

/// Stages that read whole collections or catalogs by an index of their own: nothing binds them to a tenant in a
/// shared collection.
const WHOLE: [&[u8]; 6] =
    [b"$search", b"$searchMeta", b"$vectorSearch", b"$indexStats", b"$planCacheStats", b"$listSearchIndexes"];

/// Stages of the server that tell of others or of the server itself.
const REFUSED: [&[u8]; 20] = [
    b"$currentOp",
    b"$listSessions",
    b"$listLocalSessions",
    b"$listSampledQueries",
    b"$listClusterCatalog",
    b"$listCatalog",
    b"$queryStats",
    b"$querySettings",
    b"$shardedDataDistribution",
    b"$operationMetrics",
    b"$backupCursor",
    b"$backupCursorExtend",
    b"$mergeCursors",
    b"$queue",
    b"$listMqlEntities",
    b"$listExtensions",
    b"$setVariableFromSubPipeline",
    b"$listCachedAndActiveUsers",
    b"$shardedDataDistributions",
    b"$externalFunction",
];

/// Writes a pipeline as an array named `key`.
pub(super) fn put<'a>(
    cx: &mut Cx<'_, 'a>,
    key: &str,
    stages: Document<'a>,
    source: Source,
    depth: usize,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    if depth >= PIPELINES_DEPTH_MAX {
        return Err(Fault::bad_value(format!("sub-pipelines are nested more than {PIPELINES_DEPTH_MAX} deep")));
    }
    let open = bson::open_array(out, key);
    let mut put = Stages { next: 0 };
    let mut stream = false;
    let mut count = 0;
    for (at, stage) in stages.iter().enumerate() {
        if at >= PIPELINE_STAGES_MAX {
            return Err(Fault::failed_to_parse(format!(
                "Pipeline length must be no longer than {PIPELINE_STAGES_MAX} stages"
            )));
        }
        let stage = only(stage?)?;
        count += 1;
        if at == 0 {
            stream = stage.key == b"$changeStream";
            first(cx, &stage, source, depth, &mut put, out)?;
        } else if stream {
            change::put_later(cx, &stage, &mut put, out)?;
        } else {
            later(cx, &stage, source, depth, &mut put, out)?;
        }
    }
    if count == 0 {
        empty(cx, source, &mut put, out)?;
    }
    bson::close(out, open);
    Ok(())
}

/// The numbering of stages in the output.
pub(super) struct Stages {
    next: usize,
}

impl Stages {
    /// Writes a stage by `write`, which gets the document that holds it.
    pub(super) fn put<T>(&mut self, out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let open = bson::open_document(out, Index::new(self.next).as_str());
        self.next += 1;
        let told = write(out);
        bson::close(out, open);
        told
    }

    /// A copied stage.
    pub(super) fn copy(&mut self, stage: &Element<'_>, out: &mut Vec<u8>) {
        self.put(out, |out| bson::put(out, stage));
    }

    /// `{$unset: "org_id"}`.
    pub(super) fn hide(&mut self, out: &mut Vec<u8>) {
        self.put(out, |out| bson::put_str(out, "$unset", ORG));
    }
}

/// The one field of a stage.
fn only(stage: Element<'_>) -> Result<Element<'_>, Fault> {
    let stage = stage.document().ok_or_else(|| Fault::wrong_type("pipeline", stage.key, "object"))?;
    let mut fields = stage.iter();
    match (fields.next().transpose()?, fields.next()) {
        (Some(field), None) => Ok(field),
        _ => Err(Fault::new(
            40323,
            "Location40323",
            "A pipeline stage specification object must contain exactly one field.",
        )),
    }
}

/// Whether the tenant's clause has to stand at the beginning.
fn binds(cx: &Cx<'_, '_>, source: Source) -> bool {
    cx.scope.isolation == Isolation::Filter && matches!(source, Source::Collection | Source::Joined | Source::Ranked)
}

/// `{$match: <the tenant's>}` and what hides `org_id`.
fn bind(
    cx: &Cx<'_, '_>,
    filter: Option<Document<'_>>,
    source: Source,
    put: &mut Stages,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    put.put(out, |out| predicate::put(cx.scope, cx.collation, "$match", filter, out))?;
    if source != Source::Ranked {
        put.hide(out);
    }
    Ok(())
}

fn empty(cx: &Cx<'_, '_>, source: Source, put: &mut Stages, out: &mut Vec<u8>) -> Result<(), Fault> {
    match source {
        Source::Stated => Err(must_be_stated()),
        Source::Database if cx.scope.isolation == Isolation::Filter => Err(must_be_stated()),
        _ if binds(cx, source) => bind(cx, None, source, put, out),
        _ => Ok(()),
    }
}

fn must_be_stated() -> Fault {
    Fault::new(73, "InvalidNamespace", "without a collection a pipeline has to begin with $documents")
}

fn first<'a>(
    cx: &mut Cx<'_, 'a>,
    stage: &Element<'a>,
    source: Source,
    depth: usize,
    put: &mut Stages,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let filter = cx.scope.isolation == Isolation::Filter;
    match stage.key {
        b"$changeStream" if matches!(source, Source::Collection | Source::Database) => {
            return change::put_first(cx, stage, put, out);
        }
        b"$documents" if source == Source::Stated || source == Source::Database => {
            expression::check(stage, 0)?;
            put.copy(stage, out);
            return Ok(());
        }
        _ if source == Source::Stated => return Err(must_be_stated()),
        _ if source == Source::Database && filter => return Err(must_be_stated()),
        _ => {}
    }
    if !binds(cx, source) {
        return later(cx, stage, source, depth, put, out);
    }
    match stage.key {
        b"$match" => {
            let clauses = stage.document().ok_or_else(not_an_object)?;
            bind(cx, Some(clauses), source, put, out)
        }
        b"$geoNear" => {
            put.put(out, |out| stage::put_geo_near(cx, stage, out))?;
            if source != Source::Ranked {
                put.hide(out);
            }
            Ok(())
        }
        b"$collStats" => stage::put_count(cx, stage, put, out),
        b"$rankFusion" | b"$scoreFusion" if source != Source::Ranked => {
            put.put(out, |out| stage::put_fusion(cx, stage, depth, out))?;
            put.hide(out);
            Ok(())
        }
        _ => {
            bind(cx, None, source, put, out)?;
            later(cx, stage, source, depth, put, out)
        }
    }
}

pub(super) fn not_an_object() -> Fault {
    Fault::new(15959, "Location15959", "the match filter must be an expression in an object")
}

/// A stage that stands behind others.
pub(super) fn later<'a>(
    cx: &mut Cx<'_, 'a>,
    stage: &Element<'a>,
    source: Source,
    depth: usize,
    put: &mut Stages,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let filter = cx.scope.isolation == Isolation::Filter;
    match stage.key {
        b"$match" => {
            let clauses = stage.document().ok_or_else(not_an_object)?;
            if filter && predicate::raises(clauses, 0)? {
                put.put(out, |out| bson::put_i64(out, "$limit", i64::MAX));
            }
            // What comes in is the tenant's own and has lost its `org_id`: the clauses are only checked.
            predicate::check(cx.scope, clauses)?;
            put.copy(stage, out);
        }
        b"$lookup" => put.put(out, |out| stage::put_lookup(cx, stage, depth, out))?,
        b"$graphLookup" => stage::put_graph_lookup(cx, stage, put, out)?,
        b"$unionWith" => put.put(out, |out| stage::put_union(cx, stage, depth, out))?,
        b"$facet" => put.put(out, |out| stage::put_facet(cx, stage, depth, out))?,
        b"$merge" if source == Source::Collection || source == Source::Database => {
            stage::put_merge(cx, stage, put, out)?;
        }
        b"$out" if !filter && (source == Source::Collection || source == Source::Database) => {
            put.put(out, |out| stage::put_out(cx, stage, out))?;
        }
        b"$out" if filter => {
            return Err(Fault::forbidden("$out, which replaces a whole collection (use $merge),"));
        }
        b"$merge" | b"$out" => {
            let name = String::from_utf8_lossy(stage.key);
            return Err(Fault::new(51047, "Location51047", format!("{name} is not allowed within another pipeline")));
        }
        b"$collStats" if !filter && source == Source::Collection => stage::put_coll_stats(cx, stage, put, out)?,
        b"$rankFusion" | b"$scoreFusion" if !filter => put.put(out, |out| stage::put_fusion(cx, stage, depth, out))?,
        b"$geoNear" if !filter => {
            put.put(out, |out| stage::put_geo_near(cx, stage, out))?;
        }
        b"$indexStats" | b"$planCacheStats" if !filter => {
            put.copy(stage, out);
            put.put(out, |out| put_names(out, "$unset", &["host", "shard"]));
        }
        key if WHOLE.contains(&key) && !filter => {
            expression::check(stage, 0)?;
            put.copy(stage, out);
        }
        key if PLAIN.contains(&key) => {
            expression::check(stage, 0)?;
            put.copy(stage, out);
        }
        b"$geoNear" | b"$collStats" | b"$changeStream" | b"$documents" | b"$rankFusion" | b"$scoreFusion" => {
            let name = String::from_utf8_lossy(stage.key);
            return Err(Fault::new(
                40602,
                "Location40602",
                format!("{name} is only valid as the first stage in a pipeline."),
            ));
        }
        key if WHOLE.contains(&key) || REFUSED.contains(&key) => {
            return Err(Fault::forbidden(format!("the stage {}", String::from_utf8_lossy(key))));
        }
        key => return Err(Fault::unknown_stage(key)),
    }
    Ok(())
}

/// An array of names.
pub(super) fn put_names(out: &mut Vec<u8>, key: &str, names: &[&str]) {
    let open = bson::open_array(out, key);
    for (at, name) in names.iter().enumerate() {
        bson::put_str(out, Index::new(at).as_str(), name);
    }
    bson::close(out, open);
}
