//! Sync sockets in memory: whose place they hold, when one that says nothing ends, and how the process takes leave.

use std::time::{Duration, SystemTime};

use futures_util::{SinkExt, StreamExt};
use tokio::{io::DuplexStream, task::JoinHandle};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::Role},
};

use super::{
    gauge::Gauge,
    line::Line,
    refuse::words,
    relay::Relay,
    socket::{Ended, Opening, converse, settings},
    *,
};
use crate::{
    identity::{self, Verifier, mint},
    net::{Drain, Raw, Stream},
    quota::{Stop, Table},
    tenant::{
        Names, Protocol, Status, Tenant, Tier, Tiers,
        directory::{Ask, Directory},
        namespace::{NameStyle, RootSecret},
    },
    upstream::convex::Config,
    usage::Meters,
};

const ISSUER: &str = "https://tests.dynabase.invalid/auth/v1";

/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(20);

/// More signs of life than fit into the longest silence.
const MANY: usize = 12;

/// A front before one tenant, which is called whatever its token says.
struct Place {
    server: Arc<Server>,
    table: Arc<Table>,
    secret: identity::Secret,
    org: OrgId,
}

impl Place {
    fn of_a_tenant_that_is(status: Status) -> Self {
        let secret = identity::Secret::new("abcdefghijklmnopqrstuvwxyz0123456789");
        let mut trust = identity::Config::new(ISSUER);
        trust.hs256_secret = Some(secret.clone());
        let (directory, mut asks) = Directory::new();
        tokio::spawn(async move {
            while let Some(ask) = asks.recv().await {
                if let Ask::Tenant(org, answer) = ask {
                    let _ = answer.send(Ok(Arc::new(Tenant { status, ..Tenant::new(org, Tier::Free) })));
                }
            }
        });
        let verifier = Arc::new(Verifier::new(&trust, directory.clone()).expect("a good configuration"));
        let tiers = Tiers::parse(include_str!("../../../config/tiers.toml")).expect("the shipped tiers");
        let table = Arc::new(Table::new(directory, tiers, 10));
        let gate = Arc::new(Gate::new(verifier, Arc::clone(&table), Arc::new(Meters::default()), false));
        let names = Names::new(RootSecret::new(&[7; 32]).expect("32 bytes"), NameStyle::Opaque);
        let url = Some("http://127.0.0.1:1".to_owned());
        let config = Config { public_url: url.clone(), url, ..Config::default() };
        let upstream = Upstream::new(&config, names).expect("good").expect("there");
        Self { server: Server::new(gate, upstream), table, secret, org: OrgId::parse("acme").expect("an id") }
    }

    fn token(&self) -> String {
        let subject = mint::subject(&self.org);
        mint::token(&self.secret, ISSUER, "authenticated", &self.org, &subject, LONG * 100, SystemTime::now())
    }

    /// The process goes down, as far as sessions hear of it; whoever waits for that has heard it.
    async fn drain(&self) {
        self.table.stop_where(Stop::Draining, |_| true);
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    /// A client that shows `token`, if it has one, and the task that talks with it.
    async fn client(&self, session: &str, token: Option<&str>) -> (Socket, JoinHandle<Ended>) {
        self.client_of(&Drain::new(), session, token).await
    }

    async fn client_of(&self, drain: &Drain, session: &str, token: Option<&str>) -> (Socket, JoinHandle<Ended>) {
        let (mut line, mut client) = pair().await;
        client.send(Message::text(connect(session))).await.expect("sent");
        if let Some(token) = token {
            let frame = format!(r#"{{"type":"Authenticate","baseVersion":0,"tokenType":"User","value":"{token}"}}"#);
            client.send(Message::text(frame)).await.expect("sent");
        }
        let opening = Opening {
            client: Client::alone(drain.clone()),
            path: PathAndQuery::from_static("/api/1.48.0/sync"),
            headers: HeaderMap::new(),
            host_org: None,
            stranger: Some(Arc::clone(&self.server.strangers).try_acquire_owned().expect("a place")),
        };
        let server = Arc::clone(&self.server);
        let talk = async move {
            let Err(ended) = converse(&server, &mut line, opening).await;
            ended
        };
        (client, tokio::spawn(talk))
    }

    /// A client, the task that relays its frames, and the deployment.
    async fn relayed(&self) -> (Socket, JoinHandle<Ended>, Socket) {
        let (mut line, client) = pair().await;
        let session = self.server.gate.admit(self.token().as_bytes(), Protocol::Convex).await.expect("let in");
        let deployment = self.server.upstream.deployment(&session.slot().policy().tenant).expect("there");
        let entered = self.server.sessions.enter((self.org.clone(), "s".into())).await;
        let (near, far) = tokio::io::duplex(SPACE);
        let upstream = WebSocketStream::from_raw_socket(Stream::Plain(Raw::Memory(near)), Role::Client, None).await;
        let mut relay = Relay::new(&self.server, session, deployment, entered, None, Line::new(upstream), false);
        let mut deployment = WebSocketStream::from_raw_socket(far, Role::Server, None).await;
        let task = tokio::spawn(async move { relay.run(&mut line, vec![connect("s").into()]).await });
        assert!(hears(&mut deployment).await.to_text().expect("text").contains("Connect"));
        (client, task, deployment)
    }
}

type Socket = WebSocketStream<DuplexStream>;

/// Bytes that wait for who does not read: more than anything here says.
const SPACE: usize = 1 << 20;

/// Both ends of a client's socket.
async fn pair() -> (Line<Gauge>, Socket) {
    let (near, far) = tokio::io::duplex(SPACE);
    let gauge = Gauge::new(Stream::Plain(Raw::Memory(near)), SPACE);
    let line = WebSocketStream::from_raw_socket(gauge, Role::Server, Some(settings())).await;
    (Line::new(line), WebSocketStream::from_raw_socket(far, Role::Client, None).await)
}

/// What the client hears next; it gives its signs of life by the way.
async fn hears(client: &mut Socket) -> Message {
    tokio::time::timeout(LONG, client.next()).await.expect("in time").expect("not the end").expect("a frame")
}

async fn end(task: JoinHandle<Ended>) -> Ended {
    tokio::time::timeout(LONG, task).await.expect("it ends").expect("no panic")
}

fn connect(session: &str) -> String {
    format!(r#"{{"type":"Connect","sessionId":"{session}","connectionCount":0,"lastCloseReason":null}}"#)
}

#[tokio::test]
async fn who_has_shown_its_token_no_longer_holds_a_stranger_s_place() {
    let place = Place::of_a_tenant_that_is(Status::Suspended);
    let free = || place.server.strangers.available_permits();
    let (mut known, task) = place.client("known", Some(&place.token())).await;
    assert_eq!(free(), STRANGERS_MAX - 1, "nobody has looked at it");
    let told = hears(&mut known).await;
    assert!(told.to_text().expect("text").contains("Transition"), "{told}");
    assert!(!task.is_finished());
    assert_eq!(free(), STRANGERS_MAX, "its socket is open, and its token is known");
    // Whose token is none keeps it until it has had its answer.
    let (_liar, task) = place.client("liar", Some("a.b.c")).await;
    assert_eq!(free(), STRANGERS_MAX - 1);
    assert!(matches!(end(task).await, Ended::Auth { attempted: true, .. }));
    assert_eq!(free(), STRANGERS_MAX);
}

#[tokio::test]
async fn a_stranger_is_answered_for_a_while_only_however_lively_it_is() {
    let place = Place::of_a_tenant_that_is(Status::Active);
    let (mut client, task) = place.client("s", None).await;
    let talking = tokio::spawn(async move { while let Some(Ok(_)) = client.next().await {} });
    let Ended::Close(Some((code, reason))) = end(task).await else { panic!("it is told why") };
    let expected = words(&Refusal::BadToken(TokenFault::Malformed));
    assert_eq!((code, reason), (expected.close, expected.reason()));
    talking.await.expect("no panic");
}

#[tokio::test]
async fn a_socket_that_can_t_be_served_ends_with_its_client_s_signs_of_life() {
    let place = Place::of_a_tenant_that_is(Status::Suspended);
    let token = place.token();
    let (_silent, of_silent) = place.client("silent", Some(&token)).await;
    let (mut lively, of_lively) = place.client("lively", Some(&token)).await;
    for _ in 0..MANY {
        while !matches!(hears(&mut lively).await, Message::Ping(_)) {}
    }
    assert!(matches!(end(of_silent).await, Ended::Gone("client_silent")));
    assert!(!of_lively.is_finished(), "who answers is kept");
    lively.close(None).await.expect("closed");
    assert!(matches!(end(of_lively).await, Ended::Gone("client_closed")));
}

#[tokio::test]
async fn a_client_that_comes_back_ends_its_socket_that_could_not_be_served() {
    let place = Place::of_a_tenant_that_is(Status::Suspended);
    let token = place.token();
    let (mut ghost, of_ghost) = place.client("s", Some(&token)).await;
    hears(&mut ghost).await;
    let (mut again, of_again) = place.client("s", Some(&token)).await;
    hears(&mut again).await;
    assert!(matches!(end(of_ghost).await, Ended::Gone("replaced")), "it would hold a place and a session");
    assert!(!of_again.is_finished());
}

#[tokio::test]
async fn a_relayed_socket_ends_with_its_client_s_signs_of_life() {
    let place = Place::of_a_tenant_that_is(Status::Active);
    let (_silent, of_silent, _deployment) = place.relayed().await;
    assert!(matches!(end(of_silent).await, Ended::Gone("client_silent")));
    let (mut lively, of_lively, _deployment) = place.relayed().await;
    for _ in 0..MANY {
        while !matches!(hears(&mut lively).await, Message::Ping(_)) {}
    }
    assert!(!of_lively.is_finished(), "who answers is kept");
    lively.close(None).await.expect("closed");
    assert!(matches!(end(of_lively).await, Ended::Gone("client_closed")));
}

const CALL: &str = r#"{"type":"Mutation","requestId":7,"udfPath":"messages:send","args":[{}]}"#;
const ANSWER: &str =
    r#"{"type":"MutationResponse","requestId":7,"success":true,"result":null,"ts":"AAAAAAAAAAA=","logLines":[]}"#;

/// How a client hears that the process goes down.
fn is_farewell(ended: Ended) -> bool {
    let expected = words(&Refusal::Draining);
    matches!(ended, Ended::Close(Some((code, reason))) if code == expected.close && reason == expected.reason())
}

#[tokio::test]
async fn a_process_that_goes_down_lets_calls_end_and_takes_leave() {
    let place = Place::of_a_tenant_that_is(Status::Active);
    let (_idle, task, _deployment) = place.relayed().await;
    place.drain().await;
    assert!(is_farewell(end(task).await), "nothing stood in the way");

    let (mut client, task, mut deployment) = place.relayed().await;
    client.send(Message::text(CALL)).await.expect("sent");
    assert!(hears(&mut deployment).await.to_text().expect("text").contains(r#""requestId":7"#));
    place.drain().await;
    assert!(!task.is_finished(), "its call is under way");
    deployment.send(Message::text(ANSWER)).await.expect("sent");
    assert_eq!(hears(&mut client).await.to_text().expect("text"), ANSWER);
    assert!(is_farewell(end(task).await));

    // One that never ends does not keep the process.
    let (mut client, task, mut deployment) = place.relayed().await;
    client.send(Message::text(CALL)).await.expect("sent");
    hears(&mut deployment).await;
    place.drain().await;
    assert!(is_farewell(end(task).await));
}

#[tokio::test]
async fn a_socket_that_can_t_be_served_leaves_with_the_process() {
    let place = Place::of_a_tenant_that_is(Status::Suspended);
    let drain = Drain::new();
    let (mut known, of_known) = place.client_of(&drain, "known", Some(&place.token())).await;
    hears(&mut known).await;
    let (_nobody, of_nobody) = place.client_of(&drain, "nobody", None).await;
    drain.start();
    assert!(is_farewell(end(of_known).await) && is_farewell(end(of_nobody).await));
}

#[tokio::test]
async fn what_a_deployment_says_in_words_of_its_own_passes_as_it_is() {
    let place = Place::of_a_tenant_that_is(Status::Active);
    let (mut client, _task, mut deployment) = place.relayed().await;
    for frame in [r#"{"type":"Novelty","x":[1, 2]}"#, r#"{ "later" : null, "type" : "Ping" }"#] {
        deployment.send(Message::text(frame)).await.expect("sent");
        assert_eq!(hears(&mut client).await.to_text().expect("text"), frame);
    }
}
