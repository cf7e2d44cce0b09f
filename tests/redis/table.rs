//! The command table against the real server's own.

use std::collections::BTreeMap;

use dynabase::{
    front::redis::{
        commands::{self, Keys, Policy, ROWS},
        keys::{self, Found},
    },
    wire::resp::{self, Cursor, Item},
};

use super::support::{Client, House, Redis};

/// Name, arity and the triple of key positions, for commands and subcommands.
fn walk(cursor: &mut Cursor<'_>, rows: &mut BTreeMap<String, (i64, [i64; 3])>) {
    let Some(Item::Many(_, count)) = cursor.item() else { return };
    for _ in 0..count {
        let Some(Item::Many(_, fields)) = cursor.item() else { panic!("a command is an array") };
        let Some(Item::Bulk(name)) = cursor.item() else { panic!("a name") };
        let name = String::from_utf8_lossy(name).into_owned();
        let number = |cursor: &mut Cursor<'_>| match cursor.item() {
            Some(Item::Other(text)) => String::from_utf8_lossy(&text[1..]).trim().parse::<i64>().expect("a number"),
            other => panic!("{other:?}"),
        };
        let arity = number(cursor);
        cursor.whole();
        let positions = [number(cursor), number(cursor), number(cursor)];
        rows.insert(name, (arity, positions));
        for field in 6..fields {
            if field == 9 {
                walk(cursor, rows);
            } else {
                cursor.whole();
            }
        }
    }
}

#[tokio::test]
async fn every_command_of_the_server_has_a_row_that_agrees_with_it() {
    let redis = Redis::start("").await;
    let mut client = Client::connect(redis.port).await;
    client.send(&["COMMAND"]).await;
    let frame = client.frame().await.expect("a reply");
    let mut rows = BTreeMap::new();
    walk(&mut Cursor { rest: &frame }, &mut rows);
    assert!(rows.len() > 300, "{}", rows.len());
    for (name, (arity, positions)) in rows {
        let row = ROWS.iter().find(|row| row.name == name).unwrap_or_else(|| panic!("no row for {name}"));
        assert_eq!(i64::from(row.arity), arity, "arity of {name}");
        let expected: &[[i64; 3]] = match row.keys {
            Keys::At1 => &[[1, 1, 1]],
            Keys::At2 => &[[2, 2, 1]],
            Keys::First2 => &[[1, 2, 1]],
            Keys::All => &[[1, -1, 1]],
            Keys::Every2 => &[[1, -1, 2]],
            Keys::AllButLast => &[[1, -2, 1]],
            Keys::From2 => &[[2, -1, 1]],
            Keys::Num1 | Keys::Num2 | Keys::Streams => &[[0, 0, 0]],
            Keys::DestNum2 | Keys::Radius | Keys::Sort => &[[1, 1, 1], [1, 0, 1]],
            // Refused, or its names are channels.
            Keys::Nowhere if matches!(row.policy, Policy::Refuse | Policy::Publish | Policy::Subscribe) => continue,
            Keys::Nowhere => &[[0, 0, 0]],
        };
        assert!(expected.contains(&positions), "{name}: {positions:?}, the table says {:?}", row.keys);
    }
}

#[tokio::test]
async fn the_keys_of_sample_calls_are_those_that_the_server_finds() {
    let redis = Redis::start("").await;
    let mut client = Client::connect(redis.port).await;
    for line in [
        "SET a a",
        "MSET a 1 b 2",
        "BITOP AND d a b",
        "EVAL s 2 a b c",
        "EVALSHA s 0 a",
        "ZUNIONSTORE d 2 a b WEIGHTS 1 2",
        "ZDIFF 2 a b WITHSCORES",
        "ZINTERCARD 2 a b LIMIT 1",
        "SINTERCARD 1 a",
        "LMPOP 2 a b LEFT COUNT 2",
        "BLMPOP 0 2 a b LEFT",
        "BZMPOP 0 1 a MIN",
        "BLPOP a b 0",
        "XREAD COUNT 2 BLOCK 0 STREAMS a b 0 0",
        "XREADGROUP GROUP streams c STREAMS a >",
        "GEORADIUS k 1 2 3 m COUNT 1 STORE x",
        "GEORADIUSBYMEMBER k m 3 m STOREDIST y",
        "SORT k LIMIT 0 1 STORE d",
        "XGROUP CREATE s g $",
        "OBJECT ENCODING k",
        "MEMORY USAGE k SAMPLES 1",
        "GEOSEARCHSTORE d s FROMMEMBER m BYRADIUS 1 m",
        "LMOVE a b LEFT RIGHT",
        "PFMERGE d a b",
        "RENAME a b",
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        let mut bytes = Vec::new();
        resp::put_request(&mut bytes, &words.iter().map(|w| w.as_bytes()).collect::<Vec<_>>());
        let mut request = resp::Request::default();
        request.advance(&bytes, 100, 1000).expect("valid");
        let row = commands::find(words[0].as_bytes(), None)
            .filter(|row| row.policy != Policy::Container)
            .or_else(|| commands::find(words[0].as_bytes(), Some(words[1].as_bytes())))
            .expect("known");
        let mut found = Found::default();
        keys::find(row, &request.args, &bytes, &mut found);
        let mine: Vec<String> = found.keys.iter().map(|i| format!("\"{}\"", words[*i])).collect();
        let theirs = client.run(&[&["COMMAND", "GETKEYS"], words.as_slice()].concat()).await;
        let mut mine_sorted = mine.clone();
        mine_sorted.sort();
        let mut theirs: Vec<String> =
            theirs.trim_matches(['[', ']']).split(' ').filter(|t| t.starts_with('"')).map(str::to_owned).collect();
        theirs.sort();
        assert_eq!(mine_sorted, theirs, "{line}");
    }
}

/// Every command and subcommand that the table lets through, run by one tenant with arguments that name the other
/// tenant's keys in every way, must leave the other's data as it was and show none of it.
#[tokio::test(flavor = "multi_thread")]
pub async fn no_command_touches_or_shows_another_tenants_data() {
    let house = House::start().await;
    let mut victim = house.client("hooli").await;
    for line in [
        "SET str SECRETVALUE",
        "RPUSH list SECRETVALUE",
        "SADD set SECRETVALUE",
        "ZADD zset 1 SECRETVALUE",
        "HSET hash f SECRETVALUE",
        "XADD stream 1-1 f SECRETVALUE",
        "XGROUP CREATE stream SECRETGROUP 0",
        "PFADD hll SECRETVALUE",
        "GEOADD geo 1 1 SECRETVALUE",
        "SET count 5",
    ] {
        assert!(!victim.line(line).await.starts_with('-'), "{line}");
    }
    assert_eq!(victim.line("SUBSCRIBE SECRETCHANNEL").await, "[\"subscribe\" \"SECRETCHANNEL\" :1]");
    let mut victim_eyes = house.admin().await;
    victim_eyes.line("SELECT 1").await;
    let before = digest(&mut victim_eyes).await;
    assert!(before.contains("str"), "{before}");

    let mut attacker = house.client("umbrella").await;
    let forms = |key: &str| {
        [key.to_owned(), format!("org:hooli:{key}"), "*".to_owned(), "[o]rg:hooli:*".to_owned(), "?rg:*".to_owned()]
    };
    let mut tried = 0;
    for row in ROWS {
        // What ends or silences the connection, and what waits for ever, is tried elsewhere.
        if [
            "quit",
            "reset",
            "auth",
            "hello",
            "client|reply",
            "multi",
            "exec",
            "discard",
            "subscribe",
            "psubscribe",
            "ssubscribe",
            "unsubscribe",
            "punsubscribe",
            "sunsubscribe",
        ]
        .contains(&row.name)
            || row.policy == Policy::Container
        {
            continue;
        }
        let name: Vec<&str> = row.name.split('|').collect();
        let arity = usize::from(row.arity.unsigned_abs());
        for key in ["str", "list", "set", "zset", "hash", "stream", "SECRETCHANNEL"] {
            for form in forms(key) {
                for extra in 0..2 {
                    let mut words: Vec<String> = name.iter().map(|w| (*w).to_owned()).collect();
                    while words.len() < arity + extra {
                        let at = words.len();
                        words.push(match (row.keys, at) {
                            (Keys::Num1, 1) | (Keys::Num2, 2) | (Keys::DestNum2, 2) => "1".to_owned(),
                            (Keys::Streams, 1) => "STREAMS".to_owned(),
                            (Keys::AllButLast, at) if at + 1 == arity + extra => "0.001".to_owned(),
                            _ => form.clone(),
                        });
                    }
                    if row.policy == Policy::Block && row.keys != Keys::AllButLast && row.keys != Keys::Streams {
                        continue;
                    }
                    let words: Vec<&str> = words.iter().map(String::as_str).collect();
                    let reply = tokio::time::timeout(std::time::Duration::from_secs(5), attacker.run(&words)).await;
                    let reply = reply.unwrap_or_else(|_| panic!("no answer to {words:?}"));
                    tried += 1;
                    assert!(!reply.contains("SECRETVALUE") && !reply.contains("SECRETGROUP"), "{words:?}: {reply}");
                    assert_ne!(reply, "(closed)", "{words:?}");
                    // A name of the attacker's own choosing may come back as it was sent.
                    assert!(!reply.contains("org:umbrella"), "{words:?}: {reply}");
                }
            }
        }
        attacker.line("FLUSHALL").await;
        if attacker.line("CLIENT INFO").await.contains("db=0") {
            continue;
        }
        attacker.line("SELECT 0").await;
    }
    assert!(tried > 10_000, "{tried}");
    assert_eq!(digest(&mut victim_eyes).await, before);
    assert_eq!(victim.line("PING").await, "[\"pong\" \"\"]");
    assert_eq!(attacker.line("PUBSUB CHANNELS *").await, "[]");
    assert_eq!(attacker.line("PUBSUB NUMSUB SECRETCHANNEL").await, "[\"SECRETCHANNEL\" :0]");
    assert_eq!(attacker.line("DBSIZE").await, ":0");
}

/// Every key of the selected database with its serialized value.
async fn digest(admin: &mut Client) -> String {
    let keys = admin.line("KEYS *hooli:*").await;
    let mut names: Vec<String> =
        keys.trim_matches(['[', ']']).split(' ').map(|name| name.trim_matches('"').to_owned()).collect();
    names.sort();
    let mut text = String::new();
    for name in names {
        text.push_str(&format!("{name}={}\n", admin.run(&["DUMP", &name]).await));
    }
    text
}
