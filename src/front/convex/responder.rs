//! A socket without a deployment: for a client that can't be served now and whose socket is better kept than closed,
//! because closing makes it come back at once, again and again. It *is* the server then: every version is ours, every
//! query and call fails with the refusal. No I/O.

use super::refuse::Words;
use crate::wire::convex::{
    Client, Modification, Version,
    write::{self, Outcome},
};

/// The client's state, as we alone make it.
#[derive(Debug)]
pub struct Responder {
    words: Words,
    version: Version,
}

impl Responder {
    /// Answers everything with `words`.
    pub fn new(words: Words) -> Self {
        Self { words, version: Version::default() }
    }

    /// The answers to one frame.
    pub fn answer(&mut self, frame: &Client<'_>) -> Vec<String> {
        let data = self.words.data();
        let start = self.version;
        match frame {
            Client::Connect { .. } | Client::Event => Vec::new(),
            Client::Authenticate { base, .. } => {
                self.version.identity = base.saturating_add(1);
                vec![write::transition(&start, &self.version, [])]
            }
            Client::ModifyQuerySet { new, modifications, .. } => {
                self.version.query_set = *new;
                let outcomes = modifications.iter().map(|it| match it {
                    Modification::Add { query, .. } => {
                        (*query, Outcome::Failed { message: &self.words.message, data: &data })
                    }
                    Modification::Remove { query, .. } => (*query, Outcome::Removed),
                });
                vec![write::transition(&start, &self.version, outcomes)]
            }
            Client::Call { kind, request, .. } => {
                vec![write::failed(*kind, *request, &self.words.message, &data), write::transition(&start, &start, [])]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        front::convex::refuse::words,
        refusal::Refusal,
        wire::convex::{Server, client, server},
    };

    #[test]
    fn every_frame_gets_the_answer_that_its_client_waits_for() {
        let mut responder = Responder::new(words(&Refusal::Suspended));
        let mut say = |text: &str| responder.answer(&client(text).expect("a frame"));
        assert!(say(r#"{"type":"Connect","sessionId":"s","connectionCount":0,"lastCloseReason":null}"#).is_empty());
        let told = say(r#"{"type":"Authenticate","baseVersion":0,"tokenType":"User","value":"x"}"#);
        let Ok(Server::Transition { end }) = server(&told[0]) else { panic!("{told:?}") };
        assert_eq!((end.identity, end.query_set), (1, 0));
        let told = say(
            r#"{"type":"ModifyQuerySet","baseVersion":0,"newVersion":1,"modifications":[{"type":"Add","queryId":4,"args":[{}]},{"type":"Remove","queryId":3}]}"#,
        );
        assert!(told[0].contains(r#""startVersion":{"querySet":0,"identity":1"#), "{told:?}");
        assert!(told[0].contains(r#""endVersion":{"querySet":1,"identity":1"#), "{told:?}");
        assert!(told[0].contains(r#""type":"QueryFailed","queryId":4"#) && told[0].contains("QueryRemoved"));
        let told = say(r#"{"type":"Mutation","requestId":5,"args":[{}]}"#);
        assert!(matches!(server(&told[0]), Ok(Server::Response { request: 5, success: false, .. })));
        assert!(matches!(server(&told[1]), Ok(Server::Transition { .. })), "Rust and Python wait for it");
    }
}
