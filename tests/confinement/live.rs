//! Two tenants on a real server: what the one sends, rewritten, neither shows nor changes what the other has.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use bson::{Bson, Document, doc};
use dynabase::{front::mongo::commands, tenant::Isolation};

use super::{
    bytes,
    generate::{Choice, OTHER, OWN},
    sent::{Asker, read},
};
use crate::support::mongo::shared;

/// Stands in every document of the other tenant, and nowhere else.
const SECRET: &str = "SECRET-of-the-other";

/// Requests that are sent.
const SENT: usize = 700;

/// Longest wait for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection that speaks OP_MSG and nothing else.
pub struct Wire {
    stream: TcpStream,
    id: i32,
}

impl Wire {
    pub fn open() -> Self {
        let stream = TcpStream::connect(("127.0.0.1", shared().port)).expect("the server listens");
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).expect("a timeout");
        Self { stream, id: 0 }
    }

    /// Sends sections as they are; gives the answer's document.
    pub fn send(&mut self, sections: &[u8]) -> Document {
        self.id += 1;
        let bytes = i32::try_from(16 + sections.len()).expect("short");
        let mut message = Vec::new();
        for number in [bytes, self.id, 0, 2013] {
            message.extend_from_slice(&number.to_le_bytes());
        }
        message.extend_from_slice(sections);
        self.stream.write_all(&message).expect("sent");
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).expect("an answer");
        let bytes = i32::from_le_bytes(head[..4].try_into().expect("4 bytes"));
        let mut rest = vec![0; usize::try_from(bytes).expect("a length") - 16];
        self.stream.read_exact(&mut rest).expect("a whole answer");
        Document::from_reader(&rest[5..]).expect("a document")
    }

    /// As the administrator.
    pub fn run(&mut self, command: &Document) -> Document {
        let mut sections = vec![0; 5];
        command.to_writer(&mut sections).expect("into memory");
        self.send(&sections)
    }

    /// As the tenant; the command has to be sent on.
    pub fn ask(&mut self, asker: &Asker, request: &Document) -> Document {
        let sections = asker.bytes(request).unwrap_or_else(|| panic!("not sent: {request}"));
        self.send(&sections)
    }

    pub fn batch(&mut self, command: &Document) -> Vec<Bson> {
        let answer = self.run(command);
        let cursor = answer.get_document("cursor").unwrap_or_else(|_| panic!("{command}: {answer}"));
        cursor.get_array("firstBatch").expect("a batch").clone()
    }
}

/// Documents of both, alike but for the secret; those of the other would make expressions fail.
fn fill(wire: &mut Wire, db: &str) {
    wire.run(&doc! { "dropDatabase": 1, "$db": db });
    for coll in ["c", "d", "e"] {
        let both = [(OWN, "own"), (OTHER, SECRET)].into_iter().flat_map(|(org, text)| {
            (0..4).map(move |n| {
                doc! {
                    "_id": format!("{org}-{n}"), "org_id": org, "a": n, "b": "x", "n": 1, "s": text,
                    "ssn": if org == OWN { "12".to_owned() } else { format!("{SECRET} {n}") },
                    "t": { "u": text }, "list": [{ "x": text }, { "x": 1 }],
                }
            })
        });
        let answer = wire.run(&doc! { "insert": coll, "documents": both.collect::<Vec<_>>(), "$db": db });
        assert_eq!(answer.get_i32("n").ok(), Some(8), "{answer}");
    }
}

/// What the other tenant has, in order.
fn of_other(wire: &mut Wire, db: &str) -> Vec<Bson> {
    ["c", "d", "e"]
        .into_iter()
        .flat_map(|coll| {
            wire.batch(&doc! { "find": coll, "filter": { "org_id": OTHER }, "sort": { "_id": 1 }, "$db": db })
        })
        .collect()
}

/// Everything that is neither's: a document moved out of a tenant.
fn of_nobody(wire: &mut Wire, db: &str) -> usize {
    let filter = doc! { "org_id": { "$nin": [OWN, OTHER] } };
    ["c", "d", "e"].into_iter().map(|coll| wire.batch(&doc! { "find": coll, "filter": &filter, "$db": db }).len()).sum()
}

/// Requests of the tenant, until enough of them were sent.
fn attack(db: &str, asker: &Asker) -> (usize, usize) {
    let mut wire = Wire::open();
    fill(&mut wire, db);
    let before = of_other(&mut wire, db);
    assert_eq!(before.len(), 12);
    let (mut sent, mut seen, mut worked) = (0, 0, 0);
    for seed in 1_000_000.. {
        if sent == SENT {
            break;
        }
        let mut request = Choice::new(&bytes(seed)).request();
        // Streams wait; catalogs are another test's.
        let text = request.to_string();
        let first = request.keys().next().cloned().unwrap_or_default();
        if text.contains("changeStream")
            || !["find", "aggregate", "count", "distinct", "insert", "update", "delete", "findAndModify", "bulkWrite"]
                .contains(&first.as_str())
        {
            continue;
        }
        if first != "bulkWrite" {
            request.insert("$db", "app");
        }
        let Some(sections) = asker.bytes(&request) else { continue };
        let answer = wire.send(&sections);
        sent += 1;
        worked += usize::from(answer.get_f64("ok").is_ok_and(|ok| ok == 1.0) || answer.get_i32("ok").is_ok());
        let told = answer.to_string();
        seen += usize::from(told.contains("own"));
        let shown = read(&sections).expect("text");
        assert!(!told.contains(SECRET), "shown\n  request {request}\n  sent {shown}\n  answer {answer}");
        let writes = !["find", "count", "distinct"].contains(&first.as_str());
        if writes {
            assert_eq!(of_other(&mut wire, db), before, "changed\n  request {request}\n  sent {shown}");
            assert_eq!(of_nobody(&mut wire, db), 0, "orphaned\n  request {request}\n  sent {shown}");
        }
        // Where the tenant has emptied its own, there would be nothing to see.
        if sent % 50 == 0 {
            for coll in ["c", "d", "e"] {
                wire.run(&doc! { "delete": coll, "deletes": [{ "q": { "org_id": OWN }, "limit": 0 }], "$db": db });
                let own = (0..4).map(|n| {
                    doc! {
                        "_id": format!("{OWN}-{n}"), "org_id": OWN, "a": n, "b": "x", "n": 1, "s": "own", "ssn": "12",
                        "t": { "u": "own" }, "list": [{ "x": "own" }, { "x": 1 }],
                    }
                });
                wire.run(&doc! { "insert": coll, "documents": own.collect::<Vec<_>>(), "$db": db });
            }
        }
    }
    println!("{db}: {sent} sent, {worked} worked, {seen} saw the tenant's own");
    (worked, seen)
}

#[test]
fn a_shared_collection_shows_and_changes_nothing_of_the_other() {
    let asker = Asker::new(Isolation::Filter);
    let (worked, seen) = attack("shared_app", &asker);
    assert!(worked > SENT / 2, "{worked} worked: the server takes what is written");
    assert!(seen > SENT / 20, "{seen} saw something: an attack on nothing proves nothing");
}

/// The tenant of `database` isolation can't even name the shared one.
#[test]
fn a_database_of_ones_own_never_meets_the_shared_one() {
    let asker = Asker::new(Isolation::Database);
    let mut wire = Wire::open();
    let own = asker.place.physical("app").expect("a name");
    for seed in 2_000_000..2_000_400 {
        let request = Choice::new(&bytes(seed)).request();
        let first = request.keys().next().map(String::as_str).unwrap_or_default();
        if request.to_string().contains("changeStream") || first == "drop" {
            continue;
        }
        let Some(sections) = asker.bytes(&request) else { continue };
        let answer = wire.send(&sections).to_string();
        assert!(!answer.contains(SECRET), "{request}\n{answer}");
    }
    let databases = wire.run(&doc! { "listDatabases": 1, "nameOnly": true, "$db": "admin" });
    for database in databases.get_array("databases").expect("a list").iter().filter_map(Bson::as_document) {
        let name = database.get_str("name").expect("a name");
        let known = ["admin", "local", "config", "dynabase"].contains(&name)
            || name.starts_with("shared_")
            || name.starts_with("org_")
            || name.starts_with("t_");
        assert!(known, "{name} came into being beside {own}");
    }
}

/// Every command of the server has a place in our table.
#[test]
fn the_table_knows_every_command_of_the_server() {
    let mut wire = Wire::open();
    let answer = wire.run(&doc! { "listCommands": 1, "$db": "admin" });
    let names: Vec<String> = match answer.get_document("commands") {
        Ok(commands) => commands.keys().cloned().collect(),
        // SecantusDB has no `listCommands`: these are the handlers of 0.7.0b3, read from its dispatcher.
        Err(_) => HANDLERS.split_whitespace().map(str::to_owned).collect(),
    };
    assert!(names.len() > 50);
    let unknown: Vec<&String> = names
        .iter()
        .filter(|name| !name.contains('.') && !commands::TEST_ONLY.contains(&name.as_str()))
        .filter(|name| matches!(commands::find(name.as_bytes()), commands::Found::Unknown))
        .collect();
    assert!(unknown.is_empty(), "no row: {unknown:?}");
}

const HANDLERS: &str = "abortTransaction aggregate authenticate buildInfo buildinfo bulkWrite collMod collStats
    commitTransaction configureFailPoint connectionStatus count create createIndexes createRole createSearchIndexes
    createUser currentOp dbStats dbstats delete distinct drop dropAllRolesFromDatabase dropAllUsersFromDatabase
    dropDatabase dropIndexes dropRole dropSearchIndex dropUser endSessions explain find findAndModify findandmodify
    fsync getCmdLineOpts getLog getMore getParameter grantPrivilegesToRole grantRolesToRole grantRolesToUser hello
    hostInfo insert isMaster ismaster killAllSessions killAllSessionsByPattern killCursors killOp killSessions
    listCollections listDatabases listIndexes mapReduce mapreduce ping profile refreshSessions renameCollection
    replSetGetStatus replSetStepDown revokePrivilegesFromRole revokeRolesFromRole revokeRolesFromUser rolesInfo
    saslContinue saslStart serverStatus setParameter startSession top update updateRole updateSearchIndex updateUser
    usersInfo validate whatsmyuri";
