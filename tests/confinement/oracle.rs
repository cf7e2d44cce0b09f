//! Proves of a rewritten request that it can touch no document of another tenant, and says where it can't be proved.
//! Written for itself: it shares no code and no table with the rewriting, and knows only what servers do.

use bson::{Bson, Document, doc};

/// Whose request it is to be.
pub struct Confined<'a> {
    /// The tenant, in shared collections; `None` where it has databases of its own.
    pub org: Option<&'a str>,
    /// What each physical database name begins with.
    pub prefix: &'a str,
    /// Longest time in milliseconds.
    pub max_time_ms: i32,
}

type Proof = Result<(), String>;

/// Expressions that never raise an error.
const CALM: &str = " $eq $ne $gt $gte $lt $lte $cmp $and $or $not $cond $ifNull $type $isArray $isNumber ";

/// Stages that see only what comes in.
const BLIND: &str = " $addFields $set $bucket $bucketAuto $count $densify $fill $group $limit $project $redact \
    $replaceRoot $replaceWith $sample $setWindowFields $skip $sort $sortByCount $unset $unwind ";

/// Commands that stay on `admin`.
const ADMIN: &str = " bulkWrite getMore killCursors endSessions killSessions refreshSessions startSession \
    commitTransaction abortTransaction renameCollection ";

fn listed(list: &str, name: &str) -> bool {
    list.contains(&format!(" {name} "))
}

fn need(holds: bool, what: impl Fn() -> String) -> Proof {
    if holds { Ok(()) } else { Err(what()) }
}

fn text<'d>(document: &'d Document, key: &str) -> Option<&'d str> {
    document.get(key).and_then(Bson::as_str)
}

fn child<'d>(document: &'d Document, key: &str) -> Option<&'d Document> {
    document.get(key).and_then(Bson::as_document)
}

fn list<'d>(document: &'d Document, key: &str) -> Vec<&'d Document> {
    let array = document.get(key).and_then(Bson::as_array);
    array.into_iter().flatten().filter_map(Bson::as_document).collect()
}

impl Confined<'_> {
    /// Of a request as it was sent; sections are under `@name`.
    pub fn prove(&self, sent: &Document) -> Proof {
        let command = sent.keys().next().ok_or("nothing was sent")?.as_str();
        match text(sent, "$db") {
            Some("admin") => need(listed(ADMIN, command), || format!("{command} on admin"))?,
            db => self.database(db)?,
        }
        if let Some(ms) = sent.get("maxTimeMS") {
            let ms = ms.as_i32().ok_or("time is an i32")?;
            need(0 < ms && ms <= self.max_time_ms, || format!("{ms} ms"))?;
        }
        for dangerous in ["rawData", "collectionUUID", "fromRouter", "needsMerge", "exchange", "runtimeConstants"] {
            need(!sent.contains_key(dangerous), || dangerous.to_owned())?;
        }
        self.command(command, sent)
    }

    fn database(&self, db: Option<&str>) -> Proof {
        need(db.is_some_and(|db| db.strip_prefix(self.prefix).is_some_and(|rest| !rest.is_empty())), || {
            format!("database {db:?}")
        })
    }

    fn namespace(&self, ns: Option<&str>) -> Proof {
        let (db, coll) = ns.and_then(|ns| ns.split_once('.')).ok_or("no namespace")?;
        self.database(Some(db))?;
        self.collection(Some(coll))
    }

    fn collection(&self, name: Option<&str>) -> Proof {
        need(name.is_some_and(|name| !name.is_empty() && !name.starts_with("system.") && !name.contains('$')), || {
            format!("collection {name:?}")
        })
    }

    fn command(&self, command: &str, sent: &Document) -> Proof {
        let exact = collated(sent);
        let named = || self.collection(text(sent, command));
        match command {
            "find" => {
                named()?;
                self.bound(child(sent, "filter"), exact)?;
                self.hidden(child(sent, "projection"))
            }
            "count" | "distinct" => {
                named()?;
                need(self.org.is_none() || text(sent, "key").is_none_or(|key| !of_org(key)), || "the key".into())?;
                self.bound(child(sent, "query"), exact)
            }
            "aggregate" => {
                if sent.get(command).and_then(Bson::as_str).is_some() {
                    named()?;
                }
                let reads = sent.get(command).and_then(Bson::as_str).is_some();
                self.pipeline(&list(sent, "pipeline"), reads, true, exact)
            }
            "insert" => {
                named()?;
                self.each(sent, "documents", |document| self.owned(document))
            }
            "update" => {
                named()?;
                self.each(sent, "updates", |one| {
                    self.bound(child(one, "q"), collated(one))?;
                    self.update(one.get("u").ok_or("no update")?)
                })
            }
            "delete" => {
                named()?;
                self.each(sent, "deletes", |one| self.bound(child(one, "q"), collated(one)))
            }
            "findAndModify" => {
                named()?;
                self.bound(child(sent, "query"), exact)?;
                self.hidden(child(sent, "fields"))?;
                sent.get("update").map_or(Ok(()), |update| self.update(update))
            }
            "bulkWrite" => {
                self.each(sent, "nsInfo", |one| self.namespace(text(one, "ns")))?;
                self.each(sent, "ops", |one| match one.keys().next().map(String::as_str) {
                    Some("insert") => self.owned(child(one, "document").ok_or("no document")?),
                    Some("update") => {
                        self.bound(child(one, "filter"), collated(one))?;
                        self.update(one.get("updateMods").ok_or("no update")?)
                    }
                    Some("delete") => self.bound(child(one, "filter"), collated(one)),
                    other => Err(format!("operation {other:?}")),
                })
            }
            "explain" => {
                let inner = child(sent, "explain").ok_or("no command")?;
                let name = inner.keys().next().ok_or("no command")?;
                need(self.org.is_none() || text(sent, "verbosity") == Some("queryPlanner"), || "counts".into())?;
                self.command(name, inner)
            }
            "createIndexes" => {
                named()?;
                let Some(org) = self.org else { return Ok(()) };
                self.each(sent, "indexes", |index| {
                    let key = child(index, "key").ok_or("no key")?;
                    let filter = child(index, "partialFilterExpression");
                    let own = filter.is_some_and(|filter| text(filter, "org_id") == Some(org))
                        && text(index, "name").is_some_and(|name| name.ends_with(&format!("~{org}")))
                        && !collated(index);
                    need(own || (key.len() == 1 && key.contains_key("_id")), || format!("index {index}"))
                })
            }
            "dropIndexes" => {
                named()?;
                let Some(org) = self.org else { return Ok(()) };
                let own = |name: &Bson| {
                    name.as_str().is_some_and(|name| name == "_id_" || name.ends_with(&format!("~{org}")))
                };
                let index = sent.get("index").ok_or("no index")?;
                need(index.as_array().map_or_else(|| own(index), |names| names.iter().all(own)), || index.to_string())
            }
            "create" => {
                named()?;
                let plain = ["create", "collation", "$db", "maxTimeMS", "comment", "writeConcern", "lsid"];
                need(self.org.is_none() || sent.keys().all(|key| plain.contains(&key.as_str())), || "options".into())?;
                need(self.org.is_none() || !exact, || "a collation by default".into())?;
                self.pipeline(&list(sent, "pipeline"), false, false, false)
            }
            // Its later batches can't be told from a find's: what others have must not be left for one.
            "listIndexes" => {
                let size = child(sent, "cursor").and_then(|cursor| cursor.get("batchSize"));
                let all = size.is_none_or(|size| size.as_i32().is_some_and(|size| size >= 64));
                need(self.org.is_none() || all, || "indexes in batches".into())
            }
            "getMore" | "killCursors" => Ok(()),
            other if self.org.is_none() => need(!other.is_empty(), || "a name".into()),
            other => Err(format!("{other} was sent on a shared collection")),
        }
    }

    fn each(&self, sent: &Document, key: &str, prove: impl Fn(&Document) -> Proof) -> Proof {
        let section = format!("@{key}");
        need(!(sent.contains_key(key) && sent.contains_key(&section)), || format!("{key} twice"))?;
        let name = if sent.contains_key(key) { key } else { section.as_str() };
        let all = sent.get(name).and_then(Bson::as_array).ok_or_else(|| format!("no {key}"))?;
        all.iter().try_for_each(|one| prove(one.as_document().ok_or("no document")?))
    }

    /// A filter that only the tenant's documents can pass, and that raises no error on others.
    fn bound(&self, filter: Option<&Document>, exact: bool) -> Proof {
        let Some(org) = self.org else {
            return filter.map_or(Ok(()), |filter| unscripted(&Bson::from(filter.clone())));
        };
        let filter = filter.ok_or("no filter")?;
        unscripted(&Bson::from(filter.clone()))?;
        let own = |clause: &Document| clause.len() == 1 && text(clause, "org_id") == Some(org);
        if !exact && own(filter) {
            return Ok(());
        }
        let clauses = list(filter, "$and");
        need(filter.len() == 1 && clauses.first().is_some_and(|first| own(first)), || format!("unbound: {filter}"))?;
        let mut rest = &clauses[1..];
        if exact {
            let pattern = rest.first().and_then(|clause| child(clause, "org_id"));
            let wanted = format!("^{org}$");
            need(pattern.is_some_and(|it| it.len() == 1 && text(it, "$regex") == Some(&wanted)), || {
                format!("a collation opens {filter}")
            })?;
            rest = &rest[1..];
        }
        rest.iter().try_for_each(|clause| self.calm(clause, Some(org), exact))
    }

    /// No expression in it raises an error, except where it has made sure whose the document is.
    fn calm(&self, filter: &Document, guard: Option<&str>, exact: bool) -> Proof {
        for (key, value) in filter {
            match key.as_str() {
                "$and" | "$or" | "$nor" => {
                    for clause in value.as_array().into_iter().flatten().filter_map(Bson::as_document) {
                        self.calm(clause, guard, exact)?;
                    }
                }
                "$expr" => need(calm(value) || guard.is_some_and(|org| guarded(value, org, exact)), || {
                    format!("may quote another's document: {value}")
                })?,
                _ => {}
            }
        }
        Ok(())
    }

    /// `org_id` is not shown by a projection.
    fn hidden(&self, projection: Option<&Document>) -> Proof {
        if self.org.is_none() {
            return projection.map_or(Ok(()), |projection| unscripted(&Bson::from(projection.clone())));
        }
        let projection = projection.ok_or("shown")?;
        unscripted(&Bson::from(projection.clone()))?;
        let excluded = projection.get("org_id").is_some_and(|it| it.as_i32() == Some(0));
        let included = projection.iter().any(|(key, value)| {
            let number = match value {
                Bson::Int32(n) => Some(*n != 0),
                Bson::Int64(n) => Some(*n != 0),
                Bson::Double(n) => Some(*n != 0.0),
                Bson::Boolean(b) => Some(*b),
                _ => None,
            };
            let neutral = value.as_document().is_some_and(|it| it.contains_key("$slice") || it.contains_key("$meta"));
            key != "org_id" && number.unwrap_or(!neutral)
        });
        need(excluded || (included && !projection.contains_key("org_id")), || format!("shown by {projection}"))
    }

    fn owned(&self, document: &Document) -> Proof {
        need(self.org.is_none_or(|org| text(document, "org_id") == Some(org)), || format!("not owned: {document}"))
    }

    fn update(&self, update: &Bson) -> Proof {
        match update {
            Bson::Array(stages) => {
                unscripted(update)?;
                for stage in stages {
                    let name = stage.as_document().and_then(|stage| stage.keys().next()).ok_or("no stage")?;
                    let allowed = " $set $addFields $unset $project $replaceRoot $replaceWith ";
                    need(listed(allowed, name), || format!("{name} in an update"))?;
                }
                self.sets_org(stages.last().and_then(Bson::as_document))
            }
            Bson::Document(fields) if fields.keys().next().is_some_and(|key| key.starts_with('$')) => {
                if self.org.is_none() {
                    return Ok(());
                }
                for (operator, paths) in fields {
                    need(operator.starts_with('$'), || "operators mixed with fields".into())?;
                    for (path, value) in paths.as_document().ok_or("no paths")? {
                        need(!of_org(path), || format!("{operator} writes {path}"))?;
                        let moves = operator == "$rename" && value.as_str().is_none_or(of_org);
                        need(!moves, || format!("$rename writes {value}"))?;
                    }
                }
                Ok(())
            }
            Bson::Document(fields) => self.owned(fields),
            other => Err(format!("update {other}")),
        }
    }

    fn sets_org(&self, stage: Option<&Document>) -> Proof {
        let Some(org) = self.org else { return Ok(()) };
        let value = stage.and_then(|stage| child(stage, "$set")).and_then(|set| child(set, "org_id"));
        need(value.is_some_and(|value| text(value, "$literal") == Some(org)), || format!("{stage:?} sets no org_id"))
    }

    /// `reads`: it begins at a collection. `top`: it may write.
    fn pipeline(&self, stages: &[&Document], reads: bool, top: bool, exact: bool) -> Proof {
        let mut at = 0;
        let name = |at: usize| stages.get(at).and_then(|stage| stage.keys().next()).map(String::as_str);
        if name(0) == Some("$changeStream") && self.org.is_some() {
            return self.stream(stages);
        }
        if reads && self.org.is_some() {
            let first = stages.first().ok_or("reads everything")?;
            match name(0) {
                Some("$match") => self.bound(child(first, "$match"), exact)?,
                Some("$geoNear") => {
                    self.bound(child(first, "$geoNear").and_then(|near| child(near, "query")), exact)?;
                }
                Some("$rankFusion" | "$scoreFusion") => self.fusion(first, exact)?,
                other => return Err(format!("begins with {other:?}")),
            }
            at = 1;
            let hides = stages.get(1).is_some_and(|stage| text(stage, "$unset") == Some("org_id"));
            let group = stages.get(1).and_then(|stage| child(stage, "$group"));
            let counts = group.is_some_and(|it| *it == doc! { "_id": null, "count": { "$sum": 1 } });
            need(hides || counts, || "org_id is not hidden".into())?;
        } else if !reads && top && self.org.is_some() {
            need(name(0) == Some("$documents"), || "reads the database".into())?;
            at = 1;
        }
        for (index, stage) in stages.iter().enumerate().skip(at) {
            let before = index.checked_sub(1).map(|before| stages[before]);
            need(stage.len() == 1, || format!("{stage}"))?;
            self.stage(stage, before, top, exact)?;
        }
        Ok(())
    }

    fn fusion(&self, stage: &Document, exact: bool) -> Proof {
        let body = stage.values().next().and_then(Bson::as_document).ok_or("no stage")?;
        let pipelines = child(body, "input").and_then(|input| child(input, "pipelines"));
        for (_, stages) in pipelines.into_iter().flatten() {
            let first = stages.as_array().and_then(|stages| stages.first()).and_then(Bson::as_document);
            let filter = first.and_then(|first| {
                child(first, "$match").or_else(|| child(first, "$geoNear").and_then(|near| child(near, "query")))
            });
            self.bound(filter, exact)?;
        }
        Ok(())
    }

    fn stage(&self, stage: &Document, before: Option<&Document>, top: bool, exact: bool) -> Proof {
        let (name, body) = stage.iter().next().ok_or("no stage")?;
        unscripted(body)?;
        let inner = body.as_document();
        let shared = self.org.is_some();
        match name.as_str() {
            "$match" => {
                let kept = before.and_then(|before| before.get_i64("$limit").ok()) == Some(i64::MAX);
                if shared && !kept {
                    self.calm(inner.ok_or("no filter")?, None, exact)?;
                }
                Ok(())
            }
            "$lookup" => {
                let lookup = inner.ok_or("no lookup")?;
                let from = lookup.get("from");
                if from.is_some() {
                    self.collection(text(lookup, "from"))?;
                }
                let stages = list(lookup, "pipeline");
                if from.is_none() {
                    return need(stages.first().is_some_and(|first| first.contains_key("$documents")), || {
                        "reads what it does not name".into()
                    });
                }
                self.pipeline(&stages, true, false, exact)
            }
            "$graphLookup" => {
                let lookup = inner.ok_or("no lookup")?;
                self.collection(text(lookup, "from"))?;
                self.bound(child(lookup, "restrictSearchWithMatch"), exact)
            }
            "$unionWith" => {
                if let Some(coll) = body.as_str() {
                    need(!shared, || "reads everything".into())?;
                    return self.collection(Some(coll));
                }
                let union = inner.ok_or("no union")?;
                need(!union.contains_key("db"), || "another database".into())?;
                let stages = list(union, "pipeline");
                if !union.contains_key("coll") {
                    return need(stages.first().is_some_and(|first| first.contains_key("$documents")), || {
                        "reads what it does not name".into()
                    });
                }
                self.collection(text(union, "coll"))?;
                self.pipeline(&stages, true, false, exact)
            }
            "$facet" => inner.ok_or("no facets")?.values().try_for_each(|stages| {
                let stages = stages.as_array().ok_or("no facet")?;
                let stages: Vec<&Document> = stages.iter().filter_map(Bson::as_document).collect();
                self.pipeline(&stages, false, false, exact)
            }),
            "$merge" => {
                need(top, || "$merge inside".into())?;
                let merge = inner.ok_or("no merge")?;
                self.target(merge.get("into"))?;
                if shared {
                    self.sets_org(before)?;
                    let on = merge.get("on").and_then(Bson::as_array).ok_or("matches by _id")?;
                    need(on.iter().any(|path| path.as_str() == Some("org_id")), || "matches others".into())?;
                    if let Some(update @ Bson::Array(_)) = merge.get("whenMatched") {
                        self.update(update)?;
                    }
                }
                Ok(())
            }
            "$out" => {
                need(top && !shared, || "$out replaces everybody's".into())?;
                self.target(Some(body))
            }
            "$documents" | "$changeStream" | "$geoNear" | "$collStats" | "$indexStats" | "$planCacheStats"
            | "$search" | "$searchMeta" | "$vectorSearch" | "$listSearchIndexes" | "$rankFusion" | "$scoreFusion" => {
                need(!shared, || format!("{name} reads everything"))
            }
            blind => need(listed(BLIND, blind), || format!("stage {blind}")),
        }
    }

    fn target(&self, into: Option<&Bson>) -> Proof {
        match into.ok_or("no target")? {
            Bson::String(coll) => self.collection(Some(coll)),
            Bson::Document(into) => {
                self.database(text(into, "db"))?;
                self.collection(text(into, "coll"))
            }
            other => Err(format!("target {other}")),
        }
    }

    /// A stream lets through what is the tenant's by one image and another's by none.
    fn stream(&self, stages: &[&Document]) -> Proof {
        let org = self.org.unwrap_or_default();
        let asked = child(stages[0], "$changeStream").ok_or("no stream")?;
        need(text(asked, "fullDocumentBeforeChange") == Some("whenAvailable"), || "no image before".into())?;
        need(!asked.contains_key("allChangesForCluster"), || "everybody's".into())?;
        let clauses = stages.get(1).and_then(|stage| child(stage, "$match")).map(|filter| list(filter, "$and"));
        let clauses = clauses.ok_or("unbound")?;
        for path in ["fullDocument.org_id", "fullDocumentBeforeChange.org_id"] {
            let kept = clauses.iter().any(|clause| {
                let list = child(clause, path).and_then(|it| it.get("$in")).and_then(Bson::as_array);
                clause.len() == 1 && list.is_some_and(|it| *it == [Bson::from(org), Bson::Null])
            });
            need(kept, || format!("{path} may be another's"))?;
        }
        let either = clauses.iter().map(|clause| list(clause, "$or")).find(|or| !or.is_empty()).ok_or("unbound")?;
        need(either.len() == 3, || "more than the tenant's".into())?;
        need(stages.get(2).is_some_and(|stage| child(stage, "$set").is_some()), || "names are not mapped".into())?;
        need(stages.get(3).is_some_and(|stage| stage.contains_key("$unset")), || "org_id is shown".into())?;
        for stage in &stages[4..] {
            unscripted(&Bson::from((*stage).clone()))?;
            if let Some(filter) = child(stage, "$match") {
                self.calm(filter, None, false)?;
            }
        }
        Ok(())
    }
}

fn collated(command: &Document) -> bool {
    child(command, "collation").is_some_and(|it| !it.is_empty() && text(it, "locale") != Some("simple"))
}

fn of_org(path: &str) -> bool {
    path == "org_id" || path.starts_with("org_id.")
}

fn calm(expression: &Bson) -> bool {
    match expression {
        Bson::Document(fields) => fields
            .iter()
            .all(|(key, value)| key == "$literal" || ((!key.starts_with('$') || listed(CALM, key)) && calm(value))),
        Bson::Array(list) => list.iter().all(calm),
        _ => true,
    }
}

/// `{$cond: [<it is the tenant's>, …, false]}`.
fn guarded(expression: &Bson, org: &str, exact: bool) -> bool {
    let cond = expression.as_document().and_then(|it| it.get("$cond")).and_then(Bson::as_array);
    let Some([Bson::Document(test), _, Bson::Boolean(false)]) = cond.map(Vec::as_slice) else { return false };
    if exact {
        let matches = child(test, "$regexMatch");
        let pattern = format!("^{org}$");
        return matches.is_some_and(|it| text(it, "input") == Some("$org_id") && text(it, "regex") == Some(&pattern));
    }
    let eq = test.get("$eq").and_then(Bson::as_array);
    eq.is_some_and(|eq| *eq == [Bson::from("$org_id"), Bson::from(org)])
}

/// Nothing in it runs a script, calls the server's internals, or reads the login's roles.
fn unscripted(value: &Bson) -> Proof {
    match value {
        Bson::Document(fields) => {
            for (key, value) in fields {
                if key == "$literal" {
                    continue;
                }
                let runs = ["$where", "$function", "$accumulator"].contains(&key.as_str()) || key.starts_with("$_");
                need(!runs, || key.clone())?;
                unscripted(value)?;
            }
            Ok(())
        }
        Bson::Array(list) => list.iter().try_for_each(unscripted),
        Bson::String(text) => need(!text.starts_with("$$USER_ROLES"), || text.clone()),
        _ => Ok(()),
    }
}
