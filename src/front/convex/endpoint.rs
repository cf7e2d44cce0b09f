//! What there is, and for whom. What is not here is refused, whatever deployments learn to answer.

use hyper::Method;

/// What a path is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/version` and the like: who answers.
    About,
    /// The keys of our own tokens.
    Keys,
    /// A browser's question before it asks.
    Preflight,
    /// The sync socket.
    Sync,
    /// A query with its body.
    Query,
    /// A query in a URL.
    QueryByUrl,
    /// A mutation or an action.
    Write,
    /// Any function, of a kind that its path does not say.
    Run,
    /// Many queries in one.
    Batch,
    /// A point in time to ask at.
    Timestamp,
    /// A file comes.
    Upload,
    /// A file goes.
    Download,
    /// The application's own.
    HttpAction,
}

/// Who may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anybody: no tenant is touched.
    Nobody,
    /// A tenant's users.
    Tenants,
    /// Who has the deployment's key, which nobody has here.
    Administrators,
    /// It is not known.
    Absent,
}

/// One row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub endpoint: Endpoint,
    pub access: Access,
}

/// The row of a request.
pub fn find(method: &Method, path: &str) -> Found {
    let row = |endpoint, access| Found { endpoint, access };
    let action = is_action(path);
    let get = matches!(*method, Method::GET | Method::HEAD);
    let post = *method == Method::POST;
    match path {
        // HTTP actions answer their own preflights.
        _ if *method == Method::OPTIONS && !action => row(Endpoint::Preflight, Access::Nobody),
        _ if action && ACTION_METHODS.contains(method) => row(Endpoint::HttpAction, Access::Tenants),
        "/" | "/version" | "/instance_name" | "/instance_version" if get => row(Endpoint::About, Access::Nobody),
        crate::upstream::convex::JWKS_PATH if get => row(Endpoint::Keys, Access::Nobody),
        "/api/query" if get => row(Endpoint::QueryByUrl, Access::Tenants),
        "/api/query" | "/api/query_at_ts" if post => row(Endpoint::Query, Access::Tenants),
        "/api/mutation" | "/api/action" if post => row(Endpoint::Write, Access::Tenants),
        "/api/query_batch" if post => row(Endpoint::Batch, Access::Tenants),
        "/api/query_ts" if post => row(Endpoint::Timestamp, Access::Tenants),
        "/api/storage/upload" if post => row(Endpoint::Upload, Access::Tenants),
        _ if get && is_file(path) => row(Endpoint::Download, Access::Tenants),
        _ if post && is_run(path) => row(Endpoint::Run, Access::Tenants),
        _ if *method == Method::GET && is_sync(path) => row(Endpoint::Sync, Access::Tenants),
        _ if path.starts_with("/api/") => row(Endpoint::About, Access::Administrators),
        _ => row(Endpoint::About, Access::Absent),
    }
}

/// Methods that an HTTP action may have.
const ACTION_METHODS: [Method; 7] =
    [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS];

/// `/http` and below, in words that no server on the way reads as a way out of there: `/http/../api/query` is not an
/// action. Escapes count as what they stand for, also those that are escaped again.
fn is_action(path: &str) -> bool {
    let Some(below) = path.strip_prefix("/http") else { return false };
    let Some(words) = below.strip_prefix('/') else { return below.is_empty() };
    let last = words.split('/').count() - 1;
    // An empty word is no way out, but servers differ in what they make of it; the last one is a slash at the end.
    words.split('/').enumerate().all(|(at, word)| if word.is_empty() { at == last } else { stays(word) })
}

/// Whether a word of a path is a name, however often somebody unescapes it.
fn stays(word: &str) -> bool {
    let mut bytes = word.as_bytes().to_vec();
    for _ in 0..UNESCAPES_MAX {
        // What follows a semicolon are parameters to some servers.
        let name = bytes.split(|byte| *byte == b';').next().unwrap_or_default();
        let escapes = bytes.iter().any(|byte| matches!(byte, b'/' | b'\\' | 0..=31 | 127));
        if escapes || matches!(name, b"." | b"..") {
            return false;
        }
        let plain: Vec<u8> = percent_encoding::percent_decode(&bytes).collect();
        if plain == bytes {
            return true;
        }
        bytes = plain;
    }
    false
}

/// How often an escape may be escaped again.
const UNESCAPES_MAX: usize = 4;

/// `/api/storage/{uuid}`.
fn is_file(path: &str) -> bool {
    path.strip_prefix("/api/storage/").is_some_and(crate::tenant::is_uuid)
}

/// `/api/run/{module/path}/{function}`: at least two words.
fn is_run(path: &str) -> bool {
    let words = path.strip_prefix("/api/run/").unwrap_or_default();
    words.contains('/')
        && words.split('/').all(|word| {
            !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
        })
        && words.split('/').all(|word| word != "." && !word.contains(".."))
}

/// `/api/sync`, `/api/{version}/sync`.
fn is_sync(path: &str) -> bool {
    let version =
        |text: &str| text.len() <= 32 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b".-+".contains(&b));
    match path.strip_prefix("/api/").and_then(|rest| rest.strip_suffix("sync")) {
        Some("") => true,
        Some(rest) => {
            let is_version = |text: &str| !text.is_empty() && text != "." && !text.contains("..") && version(text);
            rest.strip_suffix('/').is_some_and(is_version)
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(method: &str, path: &str) -> (Endpoint, Access) {
        let found = find(&method.parse().expect("a method"), path);
        (found.endpoint, found.access)
    }

    #[test]
    fn what_users_of_an_app_reach_is_there() {
        for (method, path, endpoint) in [
            ("POST", "/api/query", Endpoint::Query),
            ("GET", "/api/query", Endpoint::QueryByUrl),
            ("POST", "/api/mutation", Endpoint::Write),
            ("POST", "/api/action", Endpoint::Write),
            ("POST", "/api/query_batch", Endpoint::Batch),
            ("POST", "/api/query_ts", Endpoint::Timestamp),
            ("POST", "/api/query_at_ts", Endpoint::Query),
            ("POST", "/api/run/messages/send", Endpoint::Run),
            ("POST", "/api/storage/upload", Endpoint::Upload),
            ("GET", "/api/storage/018f3c2e-7b5a-4cc1-9a2f-0123456789ab", Endpoint::Download),
            ("GET", "/api/sync", Endpoint::Sync),
            ("GET", "/api/1.48.0/sync", Endpoint::Sync),
            ("PATCH", "/http/x", Endpoint::HttpAction),
            ("OPTIONS", "/http/x", Endpoint::HttpAction),
        ] {
            assert_eq!(of(method, path), (endpoint, Access::Tenants), "{method} {path}");
        }
        assert_eq!(of("OPTIONS", "/api/mutation"), (Endpoint::Preflight, Access::Nobody));
        assert_eq!(of("GET", "/.well-known/jwks.json"), (Endpoint::Keys, Access::Nobody));
    }

    #[test]
    fn what_administrators_reach_is_not() {
        for path in [
            "/api/function",
            "/api/list_snapshot",
            "/api/document_deltas",
            "/api/json_schemas",
            "/api/v1/data/sync",
            "/api/v1/pause_deployment",
            "/api/deploy2/start_push",
            "/api/push_config",
            "/api/import",
            "/api/export/request/zip",
            "/api/streaming_import/import_airbyte_records",
            "/api/app_metrics/udf_rate",
            "/api/update_environment_variables",
            "/api/run_test_function",
            "/api/stream_udf_execution",
            "/api/actions/query",
            "/api/run/one",
            "/api/run/a/../b",
            "/api/storage/../v1/x",
            "/api/storage/upload/",
            "/api/../sync",
            "/api/./sync",
            "/api/run/./a",
            "/api/a/b/sync",
        ] {
            for method in ["GET", "POST", "PUT", "DELETE"] {
                assert_eq!(of(method, path).1, Access::Administrators, "{method} {path}");
            }
        }
        for path in ["/echo", "/metrics", "/httpx", "/api", "//api/query"] {
            assert_eq!(of("POST", path).1, Access::Absent, "{path}");
        }
    }

    #[test]
    fn no_way_leads_out_of_the_actions() {
        for path in [
            "/http/../api/query",
            "/http/..",
            "/http/.",
            "/http/x/../../api/mutation",
            "/http/%2e%2e/api/mutation",
            "/http/.%2E/api/query",
            "/http/%252e%252e/api/query",
            "/http/%25252525252e./api/query",
            "/http//../../api/query",
            "/http//api/query",
            "/http/\\..\\..\\api\\query",
            "/http/..%2fapi/query",
            "/http/..%5capi/query",
            "/http/..;/api/query",
            "/http/a%00b",
        ] {
            assert_eq!(of("POST", path).1, Access::Absent, "{path}");
        }
        for path in [
            "/http",
            "/http/",
            "/http/a",
            "/http/a/",
            "/http/a.b/..c/%C3%A4?x",
            "/http/50%",
            "/http/a%20b/...",
            "/http/%zz",
        ] {
            assert_eq!(of("POST", path), (Endpoint::HttpAction, Access::Tenants), "{path}");
        }
    }
}
