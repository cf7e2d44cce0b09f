//! The stages that read or write a collection of their own.

use super::{
    Fault, ORG, Prepare, Scope, expression,
    name::{self, put_database},
    pipeline::{self, Cx, Source, Stages},
    predicate, update,
};
use crate::{
    tenant::Isolation,
    wire::mongo::bson::{self, Document, Element, Index, kind},
};

/// The fields of a stage, each of them known and there once.
pub(super) fn fields<'a>(at: &str, stage: &Element<'a>, known: &[&str]) -> Result<Document<'a>, Fault> {
    let document = stage
        .document()
        .ok_or_else(|| Fault::failed_to_parse(format!("{at} needs an object, not type {}", stage.kind)))?;
    known_fields(at, document, known)?;
    Ok(document)
}

/// Refuses unknown and repeated fields.
pub(super) fn known_fields(at: &str, document: Document<'_>, known: &[&str]) -> Result<(), Fault> {
    let mut seen = 0u64;
    for element in document {
        let element = element?;
        let index = known
            .iter()
            .position(|known| known.as_bytes() == element.key)
            .ok_or_else(|| Fault::unknown_field(at, element.key))?;
        if seen & 1 << index != 0 {
            return Err(Fault::duplicate(at, element.key));
        }
        seen |= 1 << index;
    }
    Ok(())
}

/// A field's document, where the field is there.
fn document_of<'a>(at: &str, element: Option<Element<'a>>) -> Result<Option<Document<'a>>, Fault> {
    element.map(|element| element.document().ok_or_else(|| Fault::wrong_type(at, element.key, "object"))).transpose()
}

/// A field's array.
fn array_of<'a>(at: &str, element: &Element<'a>) -> Result<Document<'a>, Fault> {
    element.array().ok_or_else(|| Fault::wrong_type(at, element.key, "array"))
}

fn filtered(scope: &Scope<'_>) -> bool {
    scope.isolation == Isolation::Filter
}

pub(super) fn put_geo_near(cx: &Cx<'_, '_>, stage: &Element<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    const KNOWN: [&str; 12] = [
        "near",
        "distanceField",
        "spherical",
        "maxDistance",
        "minDistance",
        "query",
        "distanceMultiplier",
        "includeLocs",
        "key",
        "limit",
        "num",
        "uniqueDocs",
    ];
    let given = fields("$geoNear", stage, &KNOWN)?;
    let open = bson::open_document(out, "$geoNear");
    for element in given {
        let element = element?;
        if element.key != b"query" {
            expression::check(&element, 0)?;
            bson::put(out, &element);
        }
    }
    let query = document_of("$geoNear", given.get("query")?)?;
    if query.is_some() || filtered(cx.scope) {
        predicate::put(cx.scope, cx.collation, "query", query, out)?;
    }
    bson::close(out, open);
    Ok(())
}

/// `{$collStats: {count: {}}}` of `filter`: the number of the tenant's documents. More would tell of all.
pub(super) fn put_count(
    cx: &Cx<'_, '_>,
    stage: &Element<'_>,
    put: &mut Stages,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let given = fields("$collStats", stage, &["count", "latencyStats", "storageStats", "queryExecStats"])?;
    if given.iter().map_while(Result::ok).any(|element| element.key != b"count") || given.is_empty() {
        return Err(Fault::forbidden("$collStats beyond count"));
    }
    put.put(out, |out| predicate::put(cx.scope, cx.collation, "$match", None, out))?;
    put.put(out, |out| {
        let group = bson::open_document(out, "$group");
        bson::put_null(out, "_id");
        let count = bson::open_document(out, "count");
        bson::put_i32(out, "$sum", 1);
        bson::close(out, count);
        bson::close(out, group);
    });
    put.put(out, |out| {
        let project = bson::open_document(out, "$project");
        bson::put_i32(out, "_id", 0);
        let ns = bson::open_document(out, "ns");
        name::put_text(out, b"$literal", |out| put_logical(cx, out));
        bson::close(out, ns);
        bson::put_i32(out, "count", 1);
        bson::close(out, project);
    });
    Ok(())
}

/// `database.collection` as the tenant calls it.
fn put_logical(cx: &Cx<'_, '_>, out: &mut Vec<u8>) {
    out.extend_from_slice(cx.database.as_bytes());
    out.push(b'.');
    out.extend_from_slice(cx.collection.unwrap_or_default().as_bytes());
}

/// `$collStats` of `database`: its own names, not the server's.
pub(super) fn put_coll_stats(
    cx: &Cx<'_, '_>,
    stage: &Element<'_>,
    put: &mut Stages,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    fields("$collStats", stage, &["count", "latencyStats", "storageStats", "queryExecStats"])?;
    put.copy(stage, out);
    put.put(out, |out| pipeline::put_names(out, "$unset", &["host", "shard"]));
    put.put(out, |out| {
        let set = bson::open_document(out, "$set");
        let ns = bson::open_document(out, "ns");
        name::put_text(out, b"$literal", |out| put_logical(cx, out));
        bson::close(out, ns);
        bson::close(out, set);
    });
    Ok(())
}

/// `$rankFusion`, `$scoreFusion`: each of their pipelines reads the collection.
pub(super) fn put_fusion<'a>(
    cx: &mut Cx<'_, 'a>,
    stage: &Element<'a>,
    depth: usize,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let at = stage.name().unwrap_or_default();
    let given = fields(at, stage, &["input", "combination", "scoreDetails"])?;
    let open = bson::open_document(out, at);
    for element in given {
        let element = element?;
        if element.key != b"input" {
            expression::check(&element, 0)?;
            bson::put(out, &element);
            continue;
        }
        let input = fields(at, &element, &["pipelines", "normalization"])?;
        let opened = bson::open_document(out, "input");
        for element in input {
            let element = element?;
            let Some(pipelines) = element.document().filter(|_| element.key == b"pipelines") else {
                bson::put(out, &element);
                continue;
            };
            put_pipelines(cx, "pipelines", pipelines, Source::Ranked, depth, out)?;
        }
        bson::close(out, opened);
    }
    bson::close(out, open);
    Ok(())
}

/// A document whose values are pipelines.
fn put_pipelines<'a>(
    cx: &mut Cx<'_, 'a>,
    key: &str,
    pipelines: Document<'a>,
    source: Source,
    depth: usize,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    if pipelines.has_duplicate_key()? {
        return Err(Fault::duplicate(key, b"?"));
    }
    let open = bson::open_document(out, key);
    for element in pipelines {
        let element = element?;
        let stages = array_of(key, &element)?;
        let name = element.name().ok_or_else(|| Fault::failed_to_parse("a pipeline's name is not UTF-8"))?;
        pipeline::put(cx, name, stages, source, depth + 1, out)?;
    }
    bson::close(out, open);
    Ok(())
}

pub(super) fn put_facet<'a>(
    cx: &mut Cx<'_, 'a>,
    stage: &Element<'a>,
    depth: usize,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let facets = stage
        .document()
        .ok_or_else(|| Fault::new(40169, "Location40169", "the $facet specification must be a non-empty object"))?;
    put_pipelines(cx, "$facet", facets, Source::Incoming, depth, out)
}

pub(super) fn put_lookup<'a>(
    cx: &mut Cx<'_, 'a>,
    stage: &Element<'a>,
    depth: usize,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let given = fields("$lookup", stage, &["from", "localField", "foreignField", "let", "pipeline", "as"])?;
    let from = given.get("from")?;
    if let Some(from) = from {
        foreign(cx, "$lookup", &from)?;
    }
    let open = bson::open_document(out, "$lookup");
    for element in given {
        let element = element?;
        if element.key != b"pipeline" {
            expression::check(&element, 0)?;
            bson::put(out, &element);
        }
    }
    let source = if from.is_some() { Source::Joined } else { Source::Stated };
    let stages = given.get("pipeline")?.map(|element| array_of("$lookup", &element)).transpose()?;
    put_sub(cx, stages, source, depth, out)?;
    bson::close(out, open);
    Ok(())
}

/// The `pipeline` of a stage that names a collection, or none.
fn put_sub<'a>(
    cx: &mut Cx<'_, 'a>,
    stages: Option<Document<'a>>,
    source: Source,
    depth: usize,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    const NOTHING: &[u8] = &[5, 0, 0, 0, 0];
    match stages {
        Some(stages) => pipeline::put(cx, "pipeline", stages, source, depth + 1, out),
        None if source == Source::Joined && !filtered(cx.scope) => Ok(()),
        None => pipeline::put(cx, "pipeline", Document::new(NOTHING)?, source, depth + 1, out),
    }
}

/// The name of another collection of the same database; `{db, coll}` names another database.
fn foreign<'a>(cx: &Cx<'_, 'a>, at: &str, from: &Element<'a>) -> Result<&'a str, Fault> {
    if from.kind == kind::DOCUMENT {
        return Err(Fault::forbidden(format!("{at} from another database")));
    }
    name::collection_of(cx.scope, cx.database, at, from)
}

pub(super) fn put_graph_lookup<'a>(
    cx: &mut Cx<'_, 'a>,
    stage: &Element<'a>,
    put: &mut Stages,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    const KNOWN: [&str; 8] = [
        "from",
        "startWith",
        "connectFromField",
        "connectToField",
        "as",
        "maxDepth",
        "depthField",
        "restrictSearchWithMatch",
    ];
    let given = fields("$graphLookup", stage, &KNOWN)?;
    let from = given.get("from")?.ok_or_else(|| Fault::missing("$graphLookup", "from"))?;
    foreign(cx, "$graphLookup", &from)?;
    let into = given.get("as")?.ok_or_else(|| Fault::missing("$graphLookup", "as"))?;
    let into = into.str().ok_or_else(|| Fault::wrong_type("$graphLookup", b"as", "string"))?;
    put.put(out, |out| {
        let open = bson::open_document(out, "$graphLookup");
        for element in given {
            let element = element?;
            if element.key != b"restrictSearchWithMatch" {
                expression::check(&element, 0)?;
                bson::put(out, &element);
            }
        }
        let restrict = document_of("$graphLookup", given.get("restrictSearchWithMatch")?)?;
        if restrict.is_some() || filtered(cx.scope) {
            predicate::put(cx.scope, cx.collation, "restrictSearchWithMatch", restrict, out)?;
        }
        bson::close(out, open);
        Ok::<(), Fault>(())
    })?;
    if filtered(cx.scope) {
        put.put(out, |out| put_own_only(cx, into, out));
        put.put(out, |out| {
            name::put_text(out, b"$unset", |out| {
                out.extend_from_slice(into.as_bytes());
                out.push(b'.');
                out.extend_from_slice(ORG.as_bytes());
            });
        });
    }
    Ok(())
}

/// `$set: {<into>: {$filter: <the tenant's>}}`: a server that passes over `restrictSearchWithMatch` (SecantusDB 0.7 does)
/// still shows nothing of others.
fn put_own_only(cx: &Cx<'_, '_>, into: &str, out: &mut Vec<u8>) {
    let set = bson::open_document(out, "$set");
    let field = bson::open_document(out, into);
    let filter = bson::open_document(out, "$filter");
    name::put_text(out, b"input", |out| {
        out.push(b'$');
        out.extend_from_slice(into.as_bytes());
    });
    predicate::put_is_own(cx.scope.org.as_str(), cx.collation, "cond", "$$this.org_id", out);
    bson::close(out, filter);
    bson::close(out, field);
    bson::close(out, set);
}

pub(super) fn put_union<'a>(
    cx: &mut Cx<'_, 'a>,
    stage: &Element<'a>,
    depth: usize,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    if stage.kind == kind::STRING {
        name::collection_of(cx.scope, cx.database, "$unionWith", stage)?;
        if !filtered(cx.scope) {
            bson::put(out, stage);
            return Ok(());
        }
        let open = bson::open_document(out, "$unionWith");
        bson::put_as(out, "coll", stage);
        put_sub(cx, None, Source::Joined, depth, out)?;
        bson::close(out, open);
        return Ok(());
    }
    let given = fields("$unionWith", stage, &["coll", "pipeline"])?;
    let open = bson::open_document(out, "$unionWith");
    let coll = given.get("coll")?;
    if let Some(coll) = coll {
        foreign(cx, "$unionWith", &coll)?;
        bson::put(out, &coll);
    }
    let source = if coll.is_some() { Source::Joined } else { Source::Stated };
    let stages = given.get("pipeline")?.map(|element| array_of("$unionWith", &element)).transpose()?;
    put_sub(cx, stages, source, depth, out)?;
    bson::close(out, open);
    Ok(())
}

/// `into` of `$merge` and `$out`: a collection, or one of another database of the tenant. Gives both names.
fn put_into<'a>(
    cx: &Cx<'_, 'a>,
    at: &str,
    key: &str,
    into: &Element<'a>,
    more: &[&str],
    out: &mut Vec<u8>,
) -> Result<(&'a str, &'a str), Fault> {
    if into.kind == kind::STRING {
        let name = name::collection_of(cx.scope, cx.database, at, into)?;
        bson::put_str(out, key, name);
        return Ok((cx.database, name));
    }
    let mut known = vec!["db", "coll"];
    known.extend_from_slice(more);
    let given = fields(at, into, &known)?;
    let coll = given.get("coll")?.ok_or_else(|| Fault::missing(at, "coll"))?;
    let db = match given.get("db")? {
        Some(db) => db.str().ok_or_else(|| Fault::wrong_type(at, b"db", "string"))?,
        None => cx.database,
    };
    let db = name::database(cx.scope, db)?;
    let coll = name::collection_of(cx.scope, db, at, &coll)?;
    let open = bson::open_document(out, key);
    put_database(cx.scope, "db", db, out)?;
    bson::put_str(out, "coll", coll);
    for element in given {
        let element = element?;
        if !matches!(element.key, b"db" | b"coll") {
            bson::put(out, &element);
        }
    }
    bson::close(out, open);
    Ok((db, coll))
}

/// `$out` of `database`.
pub(super) fn put_out<'a>(cx: &mut Cx<'_, 'a>, stage: &Element<'a>, out: &mut Vec<u8>) -> Result<(), Fault> {
    cx.target = Some(put_into(cx, "$out", "$out", stage, &["timeseries"], out)?);
    Ok(())
}

/// `$merge`. In `filter` what is written carries the tenant's `org_id`, and matches only what carries it: by default
/// it would match by `_id` alone and overwrite others' documents.
pub(super) fn put_merge<'a>(
    cx: &mut Cx<'_, 'a>,
    stage: &Element<'a>,
    put: &mut Stages,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let bare = stage.kind == kind::STRING;
    let given = if bare {
        None
    } else {
        Some(fields("$merge", stage, &["into", "on", "let", "whenMatched", "whenNotMatched"])?)
    };
    let filter = filtered(cx.scope);
    if filter {
        put.put(out, |out| update::put_set_org(cx.scope, out));
    }
    let into = match given {
        Some(given) => given.get("into")?.ok_or_else(|| Fault::missing("$merge", "into"))?,
        None => *stage,
    };
    let target = put.put(out, |out| {
        let open = bson::open_document(out, "$merge");
        let target = put_into(cx, "$merge", "into", &into, &[], out)?;
        put_on(filter, given, out)?;
        for element in given.into_iter().flatten() {
            let element = element?;
            match element.key {
                b"into" | b"on" => {}
                b"whenMatched" if element.kind == kind::ARRAY => {
                    update::put_pipeline(cx.scope, "whenMatched", &element, out)?;
                }
                _ => {
                    expression::check(&element, 0)?;
                    bson::put(out, &element);
                }
            }
        }
        bson::close(out, open);
        Ok::<_, Fault>(target)
    })?;
    if !filter {
        cx.target = Some(target);
        return Ok(());
    }
    let (database, collection) = target;
    if database != cx.database {
        return Err(Fault::forbidden("$merge into another database"));
    }
    cx.prepare = Some(Prepare::MergeIndex { collection });
    Ok(())
}

/// `on`: in `filter` preceded by `org_id`.
fn put_on(filter: bool, given: Option<Document<'_>>, out: &mut Vec<u8>) -> Result<(), Fault> {
    let on = given.map(|given| given.get("on")).transpose()?.flatten();
    if !filter {
        if let Some(on) = on {
            bson::put(out, &on);
        }
        return Ok(());
    }
    let open = bson::open_array(out, "on");
    bson::put_str(out, "0", ORG);
    let mut next = 1;
    let mut name = |out: &mut Vec<u8>, element: &Element<'_>| {
        let path = element.str_bytes().ok_or_else(|| Fault::wrong_type("$merge", b"on", "string"))?;
        if path != ORG.as_bytes() {
            bson::put_as(out, Index::new(next).as_str(), element);
            next += 1;
        }
        Ok::<(), Fault>(())
    };
    match on {
        None => bson::put_str(out, "1", "_id"),
        Some(on) => match on.array() {
            Some(list) => list.iter().try_for_each(|item| name(out, &item?))?,
            None => name(out, &on)?,
        },
    }
    bson::close(out, open);
    Ok(())
}
