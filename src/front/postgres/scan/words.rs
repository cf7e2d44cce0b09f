//! Words that mean something: what a statement begins with, which functions leave nothing behind.

use super::Shape;

pub(super) enum Lead {
    Set,
    Reset,
    Deallocate,
    Other,
}

/// Longest word that is compared; longer ones are nobody's keyword.
pub(super) const WORD_MAX: usize = 32;

/// What stands for a quoted name, and for one too long to be a keyword or a function of PostgreSQL's own.
pub(super) const NAME: &[u8] = b"\"";

/// A word as written.
#[derive(Clone, Copy, Default)]
pub(super) struct Word<'a>(pub(super) &'a [u8]);

impl Word<'_> {
    /// Whether it is this keyword, which is in lower case.
    pub(super) fn is(self, keyword: &[u8]) -> bool {
        self.0.eq_ignore_ascii_case(keyword)
    }

    pub(super) fn is_any(self, keywords: &[&[u8]]) -> bool {
        keywords.iter().any(|keyword| self.is(keyword))
    }

    /// In lower case.
    pub(super) fn lower(self, space: &mut [u8; WORD_MAX]) -> &[u8] {
        let Some(space) = space.get_mut(..self.0.len()) else { return NAME };
        space.copy_from_slice(self.0);
        space.make_ascii_lowercase();
        space
    }
}

/// What a statement's first word says: its kind, its shape, and whether it is one that frees storage or reads.
pub(super) fn lead_of(word: &[u8]) -> (Lead, Shape, bool) {
    let other = |shape| (Lead::Other, shape, false);
    match word {
        b"select" | b"values" | b"with" | b"table" => other(Shape::PLAIN),
        b"delete" => (Lead::Other, Shape::PLAIN, true),
        b"insert" => other(Shape::PLAIN.and(Shape::GROWS).and(Shape::MOVES_SEQUENCE)),
        b"update" => other(Shape::PLAIN.and(Shape::GROWS)),
        b"merge" => other(Shape::GROWS.and(Shape::MOVES_SEQUENCE)),
        b"set" => (Lead::Set, Shape::default(), true),
        b"reset" => (Lead::Reset, Shape::default(), true),
        b"deallocate" => (Lead::Deallocate, Shape::WIPES, true),
        b"discard" => (Lead::Other, Shape::WIPES, true),
        b"begin" | b"start" | b"commit" | b"end" | b"rollback" | b"abort" | b"savepoint" | b"release" => {
            (Lead::Other, Shape::TRANSACTION, true)
        }
        b"truncate" | b"drop" | b"vacuum" | b"show" | b"fetch" | b"move" | b"close" | b"analyze" | b"declare"
        | b"explain" | b"listen" | b"unlisten" | b"lock" | b"checkpoint" | b"copy" => {
            (Lead::Other, Shape::default(), true)
        }
        b"create" | b"alter" | b"reindex" | b"cluster" | b"refresh" | b"import" => other(Shape::GROWS),
        b"do" | b"call" | b"execute" => other(Shape::HIDDEN.and(Shape::GROWS).and(Shape::MOVES_SEQUENCE)),
        b"load" => other(Shape::LOAD),
        _ => other(Shape::default()),
    }
}

/// What a name followed by a parenthesis may do; `before` is the word before it.
pub(super) fn call(name: &[u8], before: &[u8], set_config: &mut bool) -> Shape {
    // Here a name with a parenthesis is a table, a column list or a type, not a call.
    if matches!(
        before,
        b"into" | b"table" | b"update" | b"copy" | b"index" | b"view" | b"references" | b"constraint" | b"exists"
    ) && name != b"exists"
    {
        return Shape::default();
    }
    match name {
        b"set_config" => {
            *set_config = true;
            Shape::default()
        }
        b"currval" | b"lastval" => Shape::READS_SEQUENCE,
        b"nextval" | b"setval" => Shape::MOVES_SEQUENCE,
        b"setseed" => Shape::LOAD,
        b"pg_advisory_unlock_all" => Shape::UNLOCKS_ALL,
        b"pg_advisory_lock" | b"pg_advisory_lock_shared" | b"pg_try_advisory_lock" | b"pg_try_advisory_lock_shared" => {
            Shape::ADVISORY
        }
        _ if KNOWN.binary_search(&name).is_ok() || KNOWN_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) => {
            Shape::default()
        }
        _ => Shape::HIDDEN.and(Shape::MOVES_SEQUENCE),
    }
}

/// Families of PostgreSQL's own functions that leave nothing behind. `pg_advisory_…` is dealt with above.
const KNOWN_PREFIXES: [&[u8]; 14] = [
    b"pg_",
    b"has_",
    b"json_",
    b"jsonb_",
    b"array_",
    b"regexp_",
    b"to_",
    b"date_",
    b"make_",
    b"ts_",
    b"current_",
    b"percentile_",
    b"string_",
    b"quote_",
];

/// Keywords, types and functions of PostgreSQL that may stand before a parenthesis and leave nothing behind. Sorted.
pub(super) const KNOWN: &[&[u8]] = &[
    b"abs",
    b"add",
    b"age",
    b"all",
    b"and",
    b"any",
    b"array",
    b"as",
    b"asc",
    b"ascii",
    b"avg",
    b"between",
    b"bigint",
    b"bit",
    b"bit_and",
    b"bit_length",
    b"bit_or",
    b"bool",
    b"bool_and",
    b"bool_or",
    b"btrim",
    b"by",
    b"bytea",
    b"cardinality",
    b"cast",
    b"cbrt",
    b"ceil",
    b"ceiling",
    b"char",
    b"char_length",
    b"character",
    b"check",
    b"chr",
    b"clock_timestamp",
    b"coalesce",
    b"col_description",
    b"collate",
    b"columns",
    b"concat",
    b"concat_ws",
    b"conflict",
    b"convert_from",
    b"convert_to",
    b"corr",
    b"count",
    b"cross",
    b"cube",
    b"cume_dist",
    b"cycle",
    b"dec",
    b"decimal",
    b"decode",
    b"default",
    b"degrees",
    b"dense_rank",
    b"desc",
    b"distinct",
    b"div",
    b"double",
    b"else",
    b"encode",
    b"every",
    b"except",
    b"exists",
    b"exp",
    b"extract",
    b"factorial",
    b"filter",
    b"first_value",
    b"float",
    b"floor",
    b"for",
    b"foreign",
    b"format",
    b"format_type",
    b"from",
    b"full",
    b"gen_random_uuid",
    b"generate_series",
    b"generate_subscripts",
    b"get_bit",
    b"greatest",
    b"group",
    b"grouping",
    b"groups",
    b"hashtext",
    b"having",
    b"if",
    b"ilike",
    b"in",
    b"include",
    b"initcap",
    b"inner",
    b"int",
    b"integer",
    b"intersect",
    b"interval",
    b"is",
    b"isfinite",
    b"join",
    b"justify_days",
    b"justify_hours",
    b"key",
    b"lag",
    b"last_value",
    b"lateral",
    b"lead",
    b"least",
    b"left",
    b"length",
    b"like",
    b"limit",
    b"ln",
    b"log",
    b"lower",
    b"lpad",
    b"ltrim",
    b"matched",
    b"materialized",
    b"max",
    b"md5",
    b"min",
    b"mod",
    b"mode",
    b"natural",
    b"not",
    b"now",
    b"nth_value",
    b"ntile",
    b"nullif",
    b"nulls",
    b"num_nonnulls",
    b"num_nulls",
    b"numeric",
    b"obj_description",
    b"octet_length",
    b"offset",
    b"on",
    b"or",
    b"order",
    b"outer",
    b"over",
    b"overlaps",
    b"overlay",
    b"partition",
    b"position",
    b"power",
    b"primary",
    b"random",
    b"range",
    b"rank",
    b"real",
    b"regr_slope",
    b"repeat",
    b"replace",
    b"returning",
    b"reverse",
    b"right",
    b"rollup",
    b"round",
    b"row",
    b"row_number",
    b"row_to_json",
    b"rows",
    b"rpad",
    b"rtrim",
    b"select",
    b"set",
    b"sets",
    b"shobj_description",
    b"sign",
    b"similarity",
    b"smallint",
    b"some",
    b"split_part",
    b"sqrt",
    b"stddev",
    b"stddev_pop",
    b"stddev_samp",
    b"string_agg",
    b"strpos",
    b"substr",
    b"substring",
    b"sum",
    b"tablesample",
    b"text",
    b"then",
    b"time",
    b"timestamp",
    b"timestamptz",
    b"timetz",
    b"translate",
    b"trim",
    b"trunc",
    b"union",
    b"unique",
    b"unnest",
    b"upper",
    b"using",
    b"uuid",
    b"uuid_generate_v4",
    b"values",
    b"var_pop",
    b"var_samp",
    b"varbit",
    b"varchar",
    b"variance",
    b"varying",
    b"version",
    b"when",
    b"where",
    b"width_bucket",
    b"window",
    b"with",
    b"within",
    b"xmlagg",
    b"xmlelement",
];
