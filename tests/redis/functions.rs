//! Functions: a tenant's libraries are its own, and what runs in them is confined as scripts are.

use std::time::Duration;

use dynabase::tenant::OrgId;

use super::support::{Client, House, Kind, Redis, kind, on};

async fn load(client: &mut Client, code: &str) -> String {
    client.run(&["FUNCTION", "LOAD", code]).await
}

async fn replace(client: &mut Client, code: &str) -> String {
    client.run(&["FUNCTION", "LOAD", "REPLACE", code]).await
}

/// A library of one function.
fn library(name: &str, function: &str, body: &str) -> String {
    format!("#!lua name={name}\nredis.register_function('{function}',function(keys,args) {body} end)")
}

/// Loads a function and calls it once.
async fn run(client: &mut Client, body: &str) -> String {
    let loaded = replace(client, &library("l", "f", body)).await;
    if loaded != "\"l\"" {
        return loaded;
    }
    client.line("FCALL f 0").await
}

const COUNTERS: &str = "#!lua name=counters\n\
    -- a comment with ' dynabase_tick();' in it\n\
    local function name(key) return key..':n' end\n\
    local function add(keys,args)\n\
    \x20 for i=1,tonumber(args[1] or 1) do redis.call('INCR',name(keys[1])) end\n\
    \x20 return redis.call('GET',name(keys[1]))\n\
    end\n\
    redis.register_function('add',add)\n\
    redis.register_function{function_name='peek',callback=function(keys) return {keys[1],redis.call('GET',name(keys[1]))} end,\n\
    \x20 flags={'no-writes'},description='reads'}\n";

#[tokio::test(flavor = "multi_thread")]
pub async fn a_library_works_as_on_a_private_server() {
    let house = House::start().await;
    for three in [false, true] {
        let mut client = if three { house.client3("umbrella").await } else { house.client("umbrella").await };
        assert_eq!(replace(&mut client, COUNTERS).await, "\"counters\"");
        assert_eq!(client.line("FCALL add 1 a").await, "\"1\"");
        assert_eq!(client.line("fcall ADD 1 a 4").await, "\"5\"");
        assert_eq!(client.line("FCALL_RO peek 1 a").await, "[\"a\" \"5\"]");
        assert_eq!(client.line("GET a:n").await, "\"5\"");
        // One library for all databases, each of which has its own keys.
        assert_eq!(client.line("SELECT 3").await, "+OK");
        assert_eq!(client.line("FCALL add 1 a").await, "\"1\"");
        assert_eq!(client.line("DEL a:n").await, ":1");
        assert_eq!(client.line("SELECT 0").await, "+OK");
        client.line("MULTI").await;
        assert_eq!(client.line("FCALL add 1 a").await, "+QUEUED");
        assert_eq!(client.line("FCALL peek 1 a").await, "+QUEUED");
        assert_eq!(client.line("EXEC").await, "[\"6\" [\"a\" \"6\"]]");
        let [map2, map1, set, nil] = if three { ["%", "%", "~", "_"] } else { ["", "", "", "(nil)"] };
        let functions = format!(
            "{map2}[\"name\" \"add\" \"description\" {nil} \"flags\" {set}[]] \
             {map2}[\"name\" \"peek\" \"description\" \"reads\" \"flags\" {set}[+no-writes]]"
        );
        let mut listed = client.line("FUNCTION LIST").await;
        // The server keeps functions in no order.
        let swapped = functions.split_once("]] ").map(|(one, two)| format!("{two} {one}]]")).expect("two");
        listed = listed.replace(&swapped, &functions);
        let head = format!("[{map2}[\"library_name\" \"counters\" \"engine\" \"LUA\" \"functions\" [{functions}]");
        assert_eq!(listed, format!("{head}]]"));
        let coded = client.line("FUNCTION LIST LIBRARYNAME C* WITHCODE").await.replace(&swapped, &functions);
        assert_eq!(coded, format!("{head} \"library_code\" \"{}\"]]", COUNTERS.as_bytes().escape_ascii()));
        assert_eq!(client.line("FUNCTION LIST LIBRARYNAME x*").await, "[]");
        assert_eq!(
            client.line("FUNCTION STATS").await,
            format!(
                "{map2}[\"running_script\" {nil} \"engines\" {map1}[\"LUA\" {map2}[\"libraries_count\" :1 \
                 \"functions_count\" :2]]]"
            )
        );
        assert!(client.line("FUNCTION HELP").await.starts_with("[+FUNCTION <subcommand>"));
        assert_eq!(client.line("FUNCTION DELETE counters").await, "+OK");
        assert_eq!(client.line("FUNCTION DELETE counters").await, "-ERR Library not found");
        assert_eq!(client.line("FCALL add 1 a").await, "-ERR Function not found");
        client.line("DEL a:n").await;
    }
}

#[test]
fn a_library_works_before_other_kinds_of_servers() {
    on(Kind::One, a_library_works_as_on_a_private_server);
    on(Kind::Cluster, a_library_works_as_on_a_private_server);
}

/// What a plain server answers, to the letter.
#[tokio::test(flavor = "multi_thread")]
async fn answers_are_a_plain_servers() {
    let house = House::start().await;
    let plain = Redis::start("").await;
    let mut through = house.client("umbrella").await;
    let mut direct = Client::connect(plain.port).await;
    let two = "#!lua name=two\nredis.register_function('f',function() return 2 end)";
    for words in [
        &["FUNCTION", "LOAD", ""][..],
        &["FUNCTION", "LOAD", "return 1"],
        &["FUNCTION", "LOAD", "#!lua name=l"],
        &["FUNCTION", "LOAD", "#!lua\n"],
        &["FUNCTION", "LOAD", "#!lua foo=l\n"],
        &["FUNCTION", "LOAD", "#!lua name=l name=m\n"],
        &["FUNCTION", "LOAD", "#!lua name=a-b\n"],
        &["FUNCTION", "LOAD", "#!lua name=\n"],
        &["FUNCTION", "LOAD", "#!js name=l\n"],
        &["FUNCTION", "LOAD", "#!lua 'name=l\n"],
        &["FUNCTION", "LOAD", "#!lua name=l\n"],
        &["FUNCTION", "LOAD", "#!lua name=l\nreturn redis.register_function()"],
        &["FUNCTION", "LOAD", "#!lua name=l\nreturn redis.register_function(nil,1)"],
        &["FUNCTION", "LOAD", "#!lua name=l\nreturn redis.register_function('f',function() end,1)"],
        &["FUNCTION", "LOAD", "#!lua name=l\nreturn redis.register_function('a-b',function() end)"],
        &["FUNCTION", "LOAD", "#!lua name=l\nreturn redis.register_function('',function() end)"],
        &["FUNCTION", "LOAD", "#!lua name=l\nreturn redis.register_function{callback=function() end}"],
        &["FUNCTION", "LOAD", "#!lua name=l\nreturn redis.register_function{function_name='f'}"],
        &["FUNCTION", "LOAD", "#!lua name=l\nredis.register_function{function_name='f',callback=true}"],
        &[
            "FUNCTION",
            "LOAD",
            "#!lua name=l\nredis.register_function{function_name='f',callback=function() end,flags={'x'}}",
        ],
        &[
            "FUNCTION",
            "LOAD",
            "#!lua name=l\nlocal function f() end\nredis.register_function('f',f)\nredis.register_function('f',f)",
        ],
        &["FUNCTION", "LOAD", "#!lua name=l\nlocal x=nil\nx.y=1"],
        &["FUNCTION", "LOAD", "#!lua name=l\n\nx=1"],
        &["FUNCTION", "LOAD", "#!lua name=l\nreturn math.random()"],
        &["FUNCTION", "LOAD", "#!lua name=l\nsyntax error"],
        &["FUNCTION", "LOAD", "#!lua name=l\nif x then"],
        &["FUNCTION", "LOAD", "SLOWLY", "x"],
        &["FUNCTION", "LOAD", two],
        &["FUNCTION", "LOAD", two],
        &["FUNCTION", "LOAD", "#!lua name=three\nredis.register_function('F',function() return 3 end)"],
        &["FUNCTION", "LOAD", "REPLACE", "#!lua name=two\nsyntax error"],
        &["FCALL", "f", "0"],
        &["FCALL", "f", "x"],
        &["FCALL", "f", "-1"],
        &["FCALL", "f", "1"],
        &["FCALL", "g", "0"],
        &["FCALL", "f"],
        &["FCALL_RO", "f", "0"],
        &["FUNCTION", "LIST", "x"],
        &["FUNCTION", "LIST", "LIBRARYNAME"],
        &["FUNCTION", "LIST", "LIBRARYNAME", "T?o"],
        &["FUNCTION", "LIST", "WITHCODE"],
        &["FUNCTION", "STATS"],
        &["FUNCTION", "FLUSH", "x"],
        &["FUNCTION", "FLUSH", "ASYNC", "SYNC"],
        &["FUNCTION", "DELETE"],
        &["FUNCTION", "DELETE", "none"],
        &["FUNCTION", "NONE"],
        &["FUNCTION", "FLUSH", "ASYNC"],
        &["FUNCTION", "LIST"],
    ] {
        assert_eq!(through.run(words).await, direct.run(words).await, "{words:?}");
    }
    for body in [
        "return 1",
        "return {keys[1],args[2],#keys,#args}",
        "return {1,{2,'a'},false,nil,3}",
        "return nil",
        "return {ok='fine'}",
        "return redis.error_reply('A b')",
        "return redis.status_reply('fine')",
        "error('x')",
        "error('x',0)",
        "error({err='MY x'})",
        "\n\nerror('x')",
        "return redis.call('nope')",
        "return redis.pcall('nope')",
        "local x=nil return x.y",
        "x=1",
        "return x",
        "return type(redis.register_function)",
        "return redis.register_function('g',function() end)",
        "return redis.REDIS_VERSION",
        "return redis.call('FCALL','f',0)",
        "return redis.call('FUNCTION','LIST')",
        "return redis.call('EVAL','return 1',0)",
        "return redis.sha1hex('x')",
        "return cjson.encode({1,cjson.null})",
        "return string.format('%s %d',tostring(true),math.max(1,2))",
        "local t={} for k,v in pairs({a=1}) do t[#t+1]=k end return t",
        "redis.setresp(3) return redis.call('HGETALL','none')",
        "return select('#',...)",
        "return redis.call('SET','k',args[1] or 'v')",
    ] {
        let code = library("l", "f", body);
        for words in [&["FUNCTION", "LOAD", "REPLACE", &code][..], &["FCALL", "f", "1", "k", "b", "c"]] {
            // Up to the line on which it was raised last, which is one of ours.
            let [mine, theirs] = [through.run(words).await, direct.run(words).await];
            let [mine, theirs] = [&mine, &theirs].map(|reply| reply.split(", on @user_function:").next());
            assert_eq!(mine, theirs, "{body}");
        }
    }
}

/// Whatever a library does with names, they are its tenant's.
#[tokio::test(flavor = "multi_thread")]
pub async fn no_tenant_sees_calls_or_changes_anothers_functions() {
    let house = House::start().await;
    let mut victim = house.client("hooli").await;
    assert_eq!(load(&mut victim, &library("lib", "secret", "return 'SECRETVALUE'")).await, "\"lib\"");
    victim.line("SET k SECRETVALUE").await;
    let mut attacker = house.client("umbrella").await;
    let mut admin = house.admin().await;
    let before = if kind() == Kind::Cluster { String::new() } else { admin.line("FUNCTION LIST WITHCODE").await };
    let mark = super::support::names().redis(&OrgId::parse("hooli").expect("an id")).function_mark().to_owned();
    let own = super::support::names().redis(&OrgId::parse("umbrella").expect("an id")).function_mark().to_owned();
    for name in ["secret".to_owned(), format!("{mark}secret"), format!("../{mark}secret"), "*".to_owned()] {
        for command in ["FCALL", "FCALL_RO"] {
            assert_eq!(attacker.run(&[command, &name, "0"]).await, "-ERR Function not found", "{name}");
        }
    }
    for name in ["lib".to_owned(), format!("{mark}lib"), "*".to_owned()] {
        assert_eq!(attacker.run(&["FUNCTION", "DELETE", &name]).await, "-ERR Library not found", "{name}");
        for pattern in [name.clone(), format!("*{name}*"), "?".repeat(33), "[a-z]*".to_owned(), "\\".to_owned()] {
            assert_eq!(attacker.run(&["FUNCTION", "LIST", "LIBRARYNAME", &pattern, "WITHCODE"]).await, "[]");
        }
    }
    assert_eq!(attacker.line("FUNCTION FLUSH").await, "+OK");
    for refused in ["FUNCTION DUMP", "FUNCTION RESTORE x", "FUNCTION RESTORE x FLUSH", "FUNCTION KILL"] {
        let reply = attacker.line(refused).await;
        assert!(reply.starts_with("-NOPERM "), "{refused}: {reply}");
    }
    // Names as they can be made while a library is loaded: each is the tenant's, or is refused.
    for code in [
        format!("redis.register_function('{mark}secret',function() return 1 end)"),
        format!("redis.register_function{{function_name='{mark}secret',callback=function() return 1 end}}"),
        format!("redis.register_function{{Function_Name='{mark}secret',Callback=function() return 1 end}}"),
        format!("redis.register_function{{FUNCTION_NAME='{mark}secret',callback=function() return 1 end}}"),
        "redis.register_function{'x',FUNCTION_NAME='y',CALLBACK=function() return 1 end}".to_owned(),
        "local r=redis redis=nil r.register_function('a',function() return 1 end)".to_owned(),
        "local f=redis.register_function redis={register_function=f} f('a'..'b',function() return 1 end)".to_owned(),
        "for i=1,3 do redis.register_function('n'..i,function() return i end) end".to_owned(),
        "redis.register_function(5,function() return 1 end)".to_owned(),
        "redis.register_function({},function() return 1 end)".to_owned(),
        "redis.register_function(function() end,function() return 1 end)".to_owned(),
        "redis.register_function('x',function() return 1 end,nil)".to_owned(),
        "redis.register_function('x\\0y',function() return 1 end)".to_owned(),
        "redis.register_function('x y',function() return 1 end)".to_owned(),
        "redis.register_function(true,function() return 1 end)".to_owned(),
        "redis.register_function(('').rep('x',3),function() return 1 end)".to_owned(),
        "redis.register_function(('').rep,function() return 1 end)".to_owned(),
        "redis.register_function('x','y')".to_owned(),
        "redis.register_function('x')".to_owned(),
        "redis.register_function{function_name={},callback=function() end}".to_owned(),
        "redis.register_function{function_name='x',callback=function() end,description={}}".to_owned(),
        "local t={function_name='x',callback=function() end} t.self=t redis.register_function(t)".to_owned(),
        "return api.register_function('x',function() end)".to_owned(),
        "return prelude".to_owned(),
        "return redis.call('GET','k')".to_owned(),
        "return _G.redis.register_function('x',function() end)".to_owned(),
        "return getmetatable('').__index".to_owned(),
        "return dynabase_end(function() end)".to_owned(),
        "end)(redis) redis.register_function('x',function() return 1 end) (function()".to_owned(),
        "end redis.register_function('x',function() return 1 end) do".to_owned(),
        "]] redis.register_function('x',function() return 1 end) --".to_owned(),
    ] {
        for head in ["#!lua name=l\n", "#!LUA 'NAME=l' \n", "#!lua \"name=l\"\r\n"] {
            let reply = replace(&mut attacker, &format!("{head}{code}")).await;
            assert!(reply == "\"l\"" || reply.starts_with("-ERR "), "{code}: {reply}");
            assert!(!reply.contains(&own) && !reply.contains("SECRETVALUE"), "{code}: {reply}");
            if kind() == Kind::Cluster {
                continue;
            }
            for name in names(&admin.line("FUNCTION LIST").await) {
                assert!(name.starts_with(&own) || name.starts_with(&mark), "{code}: {name}");
            }
        }
    }
    for head in [
        format!("#!lua name={mark}lib\n"),
        "#!lua name=l name=m\n".to_owned(),
        "#!lua name=l\\x0a\n".to_owned(),
        "#!lua \"name=l\\x0a#!\"\n".to_owned(),
        "#!lua name=l..x\n".to_owned(),
        "#!lua name=l]]\n".to_owned(),
        "#!lua engine=x name=l\n".to_owned(),
    ] {
        let reply = replace(&mut attacker, &format!("{head}redis.register_function('q',function() end)")).await;
        assert!(reply.starts_with("-ERR ") || reply == format!("\"{mark}lib\""), "{head}: {reply}");
    }
    assert_eq!(attacker.line("FUNCTION FLUSH SYNC").await, "+OK");
    for body in [
        "return redis.call('GET','org:hooli:k')",
        "return _G.redis.call('GET','org:hooli:k')",
        "return _G.redis.call('GET','{org:hooli}:k')",
        "return loadstring('return redis.call(\"GET\",\"org:hooli:k\")')()",
        "return load('return _G.redis.call(\"GET\",\"org:hooli:k\")')()",
        "return getmetatable(redis).__index.call('GET','org:hooli:k')",
        "return coroutine.wrap(function() return redis.call('GET','org:hooli:k') end)()",
        "local r=redis local c=r.call redis=nil return c('GET','org:hooli:k')",
        "local t={call=redis.call} setmetatable(t,{__index=redis}) return t.call('GET','org:hooli:k')",
        "keys[1]='org:hooli:k' return redis.call('GET',keys[1])",
        "args[#args+1]='1 1 1 org:hooli:' return redis.call('GET','k')",
        "redis.call('SELECT',1) return redis.call('DBSIZE')",
        "return redis.call('FCALL','secret',0)",
        "return redis.call('FUNCTION','LIST')",
        "return redis.call('KEYS','*')",
        "return redis.call('ACL','LIST')",
        "return redis.call('FLUSHALL')",
        "return newproxy(true)",
        "return getfenv(0).redis.call('GET','org:hooli:k')",
        "return {keys,args}",
    ] {
        let reply = run(&mut attacker, body).await;
        assert!(!reply.contains("SECRETVALUE") && !reply.contains("hooli") && !reply.contains(&own), "{body}: {reply}");
        assert!(!reply.contains("org:umbrella") && !reply.starts_with("+OK"), "{body}: {reply}");
    }
    attacker.line("FUNCTION FLUSH").await;
    if kind() != Kind::Cluster {
        assert_eq!(admin.line("FUNCTION LIST WITHCODE").await, before);
    }
    assert_eq!(victim.line("FCALL secret 0").await, "\"SECRETVALUE\"");
    assert_eq!(victim.line("GET k").await, "\"SECRETVALUE\"");
    // The server itself: the tenant's own user may call and no more.
    if kind() == Kind::Cluster {
        return;
    }
    let mut direct = Client::connect(house.redis.port).await;
    let password = super::support::names().password("redis", &OrgId::parse("umbrella").expect("id"), 1);
    assert_eq!(direct.run(&["AUTH", "org_umbrella", password.expose()]).await, "+OK");
    for line in
        ["FUNCTION LIST", "FUNCTION FLUSH", "FUNCTION DUMP", "FUNCTION DELETE x", "FUNCTION STATS", "FUNCTION KILL"]
    {
        assert!(direct.line(line).await.starts_with("-NOPERM "), "{line}");
    }
}

#[test]
fn no_tenant_sees_anothers_functions_on_other_kinds_of_servers() {
    on(Kind::One, no_tenant_sees_calls_or_changes_anothers_functions);
    on(Kind::Cluster, no_tenant_sees_calls_or_changes_anothers_functions);
}

/// The names of all libraries and functions in a list.
fn names(list: &str) -> Vec<&str> {
    let words: Vec<&str> = list.split('"').collect();
    words.windows(3).filter(|w| w[0] == "library_name" || w[0] == "name").map(|w| w[2]).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_keep_to_the_tier() {
    let house = House::start().await;
    let mut client = house.client("acme").await;
    let made = run(&mut client, "for i=1,2000 do redis.call('SET','k'..i,'v') end").await;
    assert!(made.starts_with("-OOM "), "{made}");
    assert_eq!(client.line("DBSIZE").await, ":1000");
    assert!(client.line("TTL k7").await.starts_with(":3"));
    assert_eq!(client.line("FLUSHALL").await, "+OK");
    for body in [
        "for i=1,9 do redis.call('SETRANGE','k'..i,10000000,'x') end",
        "for i=1,200 do redis.call('APPEND','k',string.rep('x',1000000)) end",
        "for i=1,9 do redis.call('SETBIT','k'..i,160000000,1) end",
    ] {
        let reply = run(&mut client, body).await;
        assert!(reply.starts_with("-OOM "), "{body}: {reply}");
        client.line("FLUSHALL").await;
    }
    // The last argument is ours: none of the tenant's is taken for it.
    assert_eq!(run(&mut client, "redis.call('SET','k','v') return redis.call('TTL','k')").await, ":3600");
    client.line("DEL k").await;
    assert_eq!(client.run(&["FCALL", "f", "0", "0 0 99999999999 org:hooli:"]).await, ":3600");
    assert_eq!(client.line("EXISTS k").await, ":1");
}

#[test]
fn functions_keep_to_the_tier_in_one_database() {
    on(Kind::One, functions_keep_to_the_tier);
}

/// Nothing of a call is there in the next one: the server's Lua has one memory, without a limit.
#[tokio::test(flavor = "multi_thread")]
async fn a_library_keeps_nothing_between_calls() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    let code = "#!lua name=l\nlocal kept={}\nlocal n=0\n\
                redis.register_function('f',function() n=n+1 kept[#kept+1]=string.rep('x',1e6)..n redis.kept=kept _G.kept=kept \
                return {n,#kept,redis.kept and 1} end)";
    assert_eq!(load(&mut client, code).await, "\"l\"");
    let mut admin = house.admin().await;
    for _ in 0..100 {
        assert_eq!(client.line("FCALL f 0").await, "[:1 :1 :1]");
    }
    let told = admin.line("INFO memory").await;
    let lua = told.split("used_memory_vm_functions:").nth(1).and_then(|rest| rest.split('\\').next()).expect("told");
    assert!(lua.parse::<u64>().expect("a number") < 20 << 20, "{lua}");
    // Settings that all tenants' code shares stay as they were.
    let mut other = house.client("hooli").await;
    for body in ["cjson.encode_number_precision(1)", "cjson.encode_max_depth(1)", "cjson.decode_max_depth(1)"] {
        let script = format!("{body} return cjson.encode({{3.25,{{{{1}}}}}})");
        // Up to the name of the script and the line.
        let words = |reply: String| {
            let reply = reply.split(" script: ").next().unwrap_or_default().to_owned();
            reply.replace("user_function:2:", "user_script:1:")
        };
        let function = words(run(&mut client, &script).await);
        assert_eq!(function, words(client.run(&["EVAL", &script, "0"]).await), "{body}");
        let plain = "return cjson.encode({3.25,{{{1}}},cjson.decode('[[[2]]]')})";
        for reply in [run(&mut other, plain).await, other.run(&["EVAL", plain, "0"]).await] {
            assert_eq!(reply, "\"[3.25,[[[1]]],[[[2]]]]\"", "{body}");
        }
    }
}

/// Strings have one metatable for all code in the server; where that is not locked, nobody gets at it.
#[tokio::test(flavor = "multi_thread")]
async fn what_all_code_shares_is_out_of_reach() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    for body in [
        "local m=getmetatable('') return m and 1",
        "local m=_G.getmetatable('') return m and 1",
        "local m=loadstring('return getmetatable(\"\")')() return m and 1",
        "return newproxy and 1",
        "return _G.newproxy and 1",
        "return getfenv and 1",
        "return _G.setfenv and 1",
        "return loadstring('return newproxy')() and 1",
    ] {
        for reply in [run(&mut client, body).await, client.run(&["EVAL", body, "0"]).await] {
            assert_eq!(reply, "(nil)", "{body}");
        }
    }
    let body = "local m={} return {getmetatable(setmetatable({},m))==m and 1,getmetatable(redis) and 1 or 0}";
    assert_eq!(run(&mut client, body).await, "[:1 :0]");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_function_ends_and_none_ends_the_server() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    let mut other = house.client("hooli").await;
    for body in [
        "while true do end",
        "while true do pcall(function() while true do end end) end",
        "local function f() return f() end return f()",
        "coroutine.wrap(function() while true do end end)()",
        "while true do redis.call('GET','x') end",
    ] {
        let reply = run(&mut client, body).await;
        assert!(reply.starts_with("-ERR Script killed: it ran for too long"), "{body}: {reply}");
        assert_eq!(other.line("GET k").await, "(nil)", "{body}");
    }
    // While it is loaded, by its own count: who is ended by the server is told something else.
    for code in ["while true do end", "local function f() return f() end f()", "repeat until false"] {
        let reply = load(&mut client, &format!("#!lua name=endless\n{code}")).await;
        assert_eq!(reply, "-ERR Error registering functions: it ran for too long", "{code}");
    }
    for (body, expected) in [
        ("error({})", "-ERR the script raised a value that is no text"),
        ("error({err={}})", "-ERR the script raised a value that is no text"),
        (
            "error(setmetatable({},{__index=function() return {} end}))",
            "-ERR the script raised a value that is no text",
        ),
        ("error(setmetatable({err='x'},{__newindex=function() error({}) end}))", "-x"),
        ("return setmetatable({err='x'},{__index=function() error('y') end})", "-x"),
        ("local t={} t[1]=t t[2]=t return t", "-ERR reached lua stack limit"),
        ("local t={} for i=1,60 do t={t,t} end return t", "-ERR the reply of the script is too large"),
        ("return {err='MOVED 1 127.0.0.1:1'}", "-ERR MOVED 1 127.0.0.1:1"),
        ("error({err='ASK 1 127.0.0.1:1'})", "-ERR ASK 1 127.0.0.1:1"),
    ] {
        let reply = run(&mut client, body).await;
        assert_eq!(reply.split(" script: ").next(), Some(expected), "{body}");
        assert_eq!(other.line("SET k v").await, "+OK", "{body}");
    }
    for code in ["return nil + 1", "return redis.register_function(redis)", "return redis.nothing.x", "return ('x')()"]
    {
        let reply = load(&mut client, &format!("#!lua name=wrong\n{code}")).await;
        assert!(reply.starts_with("-ERR Error registering functions: "), "{code}: {reply}");
        assert_eq!(other.line("SET k v").await, "+OK", "{code}");
    }
}

/// What can't be counted is ended from outside.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_server_is_told_to_end_the_function() {
    let house = House::start().await;
    assert_eq!(house.admin().await.line("CONFIG SET busy-reply-threshold 100").await, "+OK");
    let mut client = house.client("umbrella").await;
    assert_eq!(run(&mut client, "return 1").await, ":1");
    // Let the one who looks have its connection.
    let mut admin = house.admin().await;
    while !admin.line("CLIENT LIST").await.contains("cmd=ping") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let reply = run(&mut client, "for i=1,3e6 do local s=string.rep('x',8e3) end return 1").await;
    assert!(reply.contains("Script killed by user"), "{reply}");
    assert_eq!(house.client("hooli").await.line("SET k v").await, "+OK");
}

#[tokio::test(flavor = "multi_thread")]
async fn libraries_have_a_number_and_a_size() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    let long = "x".repeat(100 << 10);
    for i in 0..2 {
        let code = format!("{} --{long}", library(&format!("long{i}"), &format!("f{i}"), "return 1"));
        assert_eq!(load(&mut client, &code).await, format!("\"long{i}\""));
    }
    let code = format!("{} --{long}", library("long3", "f3", "return 1"));
    let reply = load(&mut client, &code).await;
    assert!(reply.starts_with("-OOM the code of a tenant's function libraries has at most 256 KB"), "{reply}");
    let code = format!("{} --{long}", library("long1", "f1", "return 2"));
    assert_eq!(replace(&mut client, &code).await, "\"long1\"", "what it replaces does not count");
    assert_eq!(client.line("FCALL f1 0").await, ":2");
    let huge = format!("{} --{}", library("huge", "h", "return 1"), "x".repeat(1 << 20));
    assert!(load(&mut client, &huge).await.starts_with("-OOM "));
    assert_eq!(client.line("FUNCTION FLUSH").await, "+OK");
    for (code, expected) in [
        ("for i=1,129 do redis.register_function('f'..i,function() end) end", "a library has at most 128 functions"),
        ("redis.register_function(('x'):rep(65),function() end)", "names have at most 64 bytes, descriptions 1024"),
        (
            "redis.register_function{function_name='f',callback=function() end,description=('x'):rep(1025)}",
            "names have at most 64 bytes, descriptions 1024",
        ),
    ] {
        let reply = load(&mut client, &format!("#!lua name=l\n{code}")).await;
        assert_eq!(reply, format!("-ERR Error registering functions: {expected}"));
    }
    // However many load at once, through whatever process.
    let ports = [house.port, house.second_front().await];
    let mut tasks = Vec::new();
    for task in 0..8 {
        let token = house.token("umbrella");
        let port = ports[task % 2];
        tasks.push(tokio::spawn(async move {
            let mut client = Client::connect(port).await;
            assert_eq!(client.run(&["AUTH", "app", &token]).await, "+OK");
            let mut loaded = 0;
            for i in 0..8 {
                let name = format!("l{task}x{i}");
                loaded +=
                    usize::from(load(&mut client, &library(&name, &name, "return 1")).await == format!("\"{name}\""));
            }
            loaded
        }));
    }
    let mut loaded = 0;
    for task in tasks {
        loaded += task.await.expect("it ran");
    }
    let stats = client.line("FUNCTION STATS").await;
    assert!(stats.contains(&format!("\"libraries_count\" :{loaded} ")), "{stats}");
    assert!((1..=32).contains(&loaded), "{loaded}");
    // One at a time, up to the last.
    for i in loaded..33 {
        let name = format!("last{i}");
        let reply = load(&mut client, &library(&name, &name, "return 1")).await;
        assert_eq!(reply == format!("\"{name}\""), i < 32, "{reply}");
    }
    assert!(load(&mut client, &library("more", "more", "return 1")).await.starts_with("-OOM a tenant has at most 32"));
}

/// A deleted tenant leaves no library, and takes none of others along.
#[tokio::test(flavor = "multi_thread")]
pub async fn a_purge_takes_the_libraries_along() {
    let house = House::start().await;
    let mut other = house.client("hooli").await;
    load(&mut other, &library("lib", "f", "return 7")).await;
    {
        let mut client = house.client("umbrella").await;
        load(&mut client, &library("lib", "f", "return 1")).await;
        load(&mut client, &library("more", "g", "return 1")).await;
    }
    house.upstream().remove(&OrgId::parse("umbrella").expect("an id"), true).await.expect("it is removed");
    for node in std::iter::once(&house.redis).chain(&house.more) {
        let list = node.admin().await.line("FUNCTION LIST").await;
        assert_eq!(names(&list).len(), 2, "{list}");
    }
    assert_eq!(other.line("FCALL f 0").await, ":7");
}

#[test]
fn a_purge_takes_the_libraries_from_every_node() {
    on(Kind::Cluster, a_purge_takes_the_libraries_along);
}

/// Each master has the library, since the tenant's slot may move there.
#[test]
fn a_cluster_has_a_library_at_every_master() {
    on(Kind::Cluster, every_master_has_it);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_master_has_it() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    assert_eq!(load(&mut client, &library("lib", "f", "return 1")).await, "\"lib\"");
    assert_eq!(replace(&mut client, &library("lib", "g", "return redis.call('SET',keys[1],'v')")).await, "\"lib\"");
    for node in std::iter::once(&house.redis).chain(&house.more) {
        let list = node.admin().await.line("FUNCTION LIST").await;
        assert!(names(&list).iter().any(|name| name.ends_with("_g")) && names(&list).len() == 2, "{list}");
    }
    assert_eq!(client.line("FCALL g 1 k").await, "+OK");
    assert_eq!(client.line("FUNCTION DELETE lib").await, "+OK");
    for node in std::iter::once(&house.redis).chain(&house.more) {
        assert_eq!(node.admin().await.line("FUNCTION LIST").await, "[]");
    }
}
