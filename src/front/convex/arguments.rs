//! The organisation in the arguments of a call over HTTP, where its deployment is shared; and what of a call's body or
//! URL is refused wherever it goes. No I/O.

use std::{borrow::Cow, ops::Range};

use super::query;
use crate::{refusal::Refusal, wire::convex::rewrite};

/// Most queries in one batch.
const BATCH_MAX: usize = 1000;

/// The organisation's argument, where the deployment has one.
pub struct Own<'a> {
    pub name: Option<&'a str>,
    pub org: &'a str,
}

impl Own<'_> {
    /// A call's body as it goes on; `None` as it came.
    pub fn call(&self, text: &str) -> Result<Option<String>, Refusal> {
        let [args, component] = rewrite::body(text, ["args", "componentPath"]).map_err(malformed)?;
        if component.is_some_and(|at| &text[at] != "null") {
            return Err(Refusal::Forbidden { what: "functions of components are for administrators" });
        }
        let Some(name) = self.name else { return Ok(None) };
        let args = args.ok_or(Refusal::Malformed { what: "a call needs args" })?;
        let own = rewrite::with_argument(&text[args.clone()], name, self.org).map_err(malformed)?;
        Ok(Some(rewrite::replace(text, &args, &own)))
    }

    /// A batch's body as it goes on, and how many calls it is.
    pub fn batch(&self, text: &str) -> Result<(Option<String>, u64), Refusal> {
        let [queries] = rewrite::body(text, ["queries"]).map_err(malformed)?;
        let queries: Range<usize> = queries.ok_or(Refusal::Malformed { what: "a batch needs queries" })?;
        let calls = rewrite::elements(text, &queries, BATCH_MAX).map_err(malformed)?;
        let rewritten: Vec<Cow<'_, str>> = calls
            .iter()
            .map(|at| Ok(self.call(&text[at.clone()])?.map_or(Cow::Borrowed(&text[at.clone()]), Cow::Owned)))
            .collect::<Result<_, Refusal>>()?;
        let body =
            self.name.map(|_| rewrite::replace(text, &queries, &rewrite::array(rewritten.iter().map(AsRef::as_ref))));
        Ok((body, calls.len() as u64))
    }
}

fn malformed(error: crate::wire::Error) -> Refusal {
    Refusal::Malformed { what: error.what }
}

/// A query's URL, with the names that a query has and no others.
pub fn query_url(asked: &str, own: &Own<'_>) -> Result<String, Refusal> {
    let mut url = String::from("/api/query");
    let mut begin = '?';
    for name in ["path", "args", "format"] {
        let mut values = query::pairs(asked).filter(|(key, _)| key == name).map(|(_, value)| value);
        let (value, more) = (values.next(), values.next());
        if more.is_some() {
            return Err(Refusal::Malformed { what: "a parameter twice" });
        }
        let value = match (name, own.name, value) {
            ("args", Some(argument), value) => {
                let args = value.unwrap_or(Cow::Borrowed("{}"));
                Some(Cow::Owned(rewrite::with_argument(&args, argument, own.org).map_err(malformed)?))
            }
            (_, _, value) => value,
        };
        if let Some(value) = value {
            url.push(begin);
            url.push_str(&format!("{name}={}", query::encode(&value)));
            begin = '&';
        }
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARED: Own<'static> = Own { name: Some("orgId"), org: "acme" };
    const OWN: Own<'static> = Own { name: None, org: "acme" };

    #[test]
    fn a_batch_counts_and_is_written_into_as_its_queries() {
        let text = r#"{"queries":[{"path":"a:b","args":[{}]},{"args":{"orgId":"globex"},"path":"a:c"}],"x":1}"#;
        assert_eq!(OWN.batch(text), Ok((None, 2)));
        let (body, units) = SHARED.batch(text).expect("good");
        assert_eq!(units, 2);
        assert_eq!(
            body.as_deref(),
            Some(
                r#"{"queries":[{"path":"a:b","args":[{"orgId":"acme"}]},{"args":{"orgId":"acme"},"path":"a:c"}],"x":1}"#
            )
        );
        for bad in [r#"{"queries":[{"path":"a","args":[{}],"componentPath":"c"}]}"#, r#"{"queries":1}"#, "{}", "[]"] {
            assert!(SHARED.batch(bad).is_err() && OWN.batch(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_url_asks_for_its_own_organisation_and_nothing_more() {
        let asked = "path=a%3Ab&args=%7B%22orgId%22%3A%22globex%22%7D&adminKey=x&componentPath=c";
        let url = query_url(asked, &SHARED).expect("good");
        assert_eq!(url, "/api/query?path=a%3Ab&args=%7B%22orgId%22%3A%22acme%22%7D");
        assert!(query_url("args={}&%61rgs={}", &OWN).is_err(), "which of the two would count?");
    }
}
