//! `FUNCTION`: a tenant's libraries, run by the platform's user, since the server has them in one place for everybody.
//! Calls (`FCALL`) go the way of scripts ([`super::request`]).

use super::{
    client::{Client, Held},
    library, refuse,
};
use crate::{
    quota::clock,
    refusal::Refusal,
    upstream::redis::{
        DialError, Version,
        library::{Answer, Library},
        link::LOST,
        reply::{Shape, strip},
    },
    wire::resp::{put_array, put_bulk, put_error, put_head, put_integer, put_status},
};

/// Libraries of one tenant: the server has them for ever, looks through all tenants' when it lists one's, and each
/// comes with some 13 KB of ours.
const LIBRARIES_MAX: usize = 32;

/// Bytes of their code together, as the tenant gave it. It takes several times as much in the server, where no cap of
/// the tier counts it.
const CODE_MAX_BYTES: usize = 256 << 10;

/// What is said of a payload that holds everybody's libraries, or would replace them.
const NO_DUMP: &str = "NOPERM FUNCTION DUMP and FUNCTION RESTORE are about all libraries of the server: use FUNCTION \
                       LIST WITHCODE and FUNCTION LOAD";

const HELP: [&str; 17] = [
    "FUNCTION <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    "LOAD [REPLACE] <FUNCTION CODE>",
    "    Create a new library with the given library name and code.",
    "DELETE <LIBRARY NAME>",
    "    Delete the given library.",
    "LIST [LIBRARYNAME PATTERN] [WITHCODE]",
    "    Return general information on all the libraries:",
    "    * Library name",
    "    * The engine used to run the Library",
    "    * Functions list",
    "    * Library code (if WITHCODE is given)",
    "STATS",
    "    Return information about the libraries: how many there are, and how many functions.",
    "FLUSH [ASYNC|SYNC]",
    "    Delete all the libraries.",
    "HELP",
    "    Print this help.",
];

impl Client {
    /// Runs one of its subcommands; nothing is outstanding.
    pub(super) async fn functions(&mut self, held: &Held) {
        let words: Vec<&[u8]> = held.args[2..].iter().map(|arg| arg.of(&held.bytes)).collect();
        let result = match held.row.name {
            "function|load" => self.load_library(&words).await,
            "function|delete" => self.delete_library(words[0]).await,
            "function|flush" => self.flush_libraries(&words).await,
            "function|list" => self.list_libraries(&words).await,
            "function|stats" => self.function_stats().await,
            "function|help" => {
                let mut out = Vec::new();
                put_array(&mut out, HELP.len());
                HELP.iter().for_each(|line| put_status(&mut out, line));
                self.say(&out);
                Ok(())
            }
            _ => {
                self.fail(NO_DUMP);
                Ok(())
            }
        };
        match result {
            Ok(()) => {}
            // What the server says of itself, in words that clients know.
            Err(DialError::Refused(text))
                if ["BUSY ", "OOM ", "MISCONF "].iter().any(|word| text.starts_with(word)) =>
            {
                self.fail(&text);
            }
            Err(error @ DialError::Refused(_)) => {
                tracing::warn!(%error, "a command about functions was refused");
                self.fail(&refuse::render(&Refusal::UpstreamDown).0);
            }
            Err(error) => {
                tracing::warn!(%error, "a command about functions failed");
                self.fail(LOST);
            }
        }
    }

    /// Gives the server's error without what is ours in it.
    fn tell(&mut self, error: &str) {
        let Some(tenancy) = &self.tenancy else { return };
        let (mut bytes, mut out) = (Vec::new(), Vec::new());
        put_error(&mut bytes, &library::told(error));
        strip(Shape::Raw, &bytes, &tenancy.database.prefix, &mut out);
        self.say(&out);
    }

    async fn load_library(&mut self, words: &[&[u8]]) -> Result<(), DialError> {
        let Some((code, options)) = words.split_last() else { return Ok(()) };
        if let Some(option) = options.iter().find(|option| !option.eq_ignore_ascii_case(b"REPLACE")) {
            self.fail(&format!("ERR Unknown option given: {}", String::from_utf8_lossy(option)));
            return Ok(());
        }
        let replace = !options.is_empty();
        let Some(tenancy) = &self.tenancy else { return Ok(()) };
        let place = std::sync::Arc::clone(&tenancy.place);
        // Longer than all may be together: nobody reads it.
        let wrapped = match code.len() > CODE_MAX_BYTES {
            true => Err(too_long()),
            false => library::wrap(code, &place.space, !place.is_shared()),
        };
        let wrapped = match wrapped {
            Ok(wrapped) => wrapped,
            Err(text) => {
                self.fail(&text);
                return Ok(());
            }
        };
        let may = |libraries: &[Library]| -> Answer {
            let others = libraries.iter().filter(|other| !(replace && other.name == wrapped.name.as_bytes()));
            let (mut count, mut bytes) = (1, code.len());
            for other in others {
                count += 1;
                bytes += library::original(&other.code).map_or(other.code.len(), |code| code.len());
            }
            if count > LIBRARIES_MAX {
                return Err(format!("OOM a tenant has at most {LIBRARIES_MAX} function libraries; delete some"));
            }
            if bytes > CODE_MAX_BYTES { Err(too_long()) } else { Ok(()) }
        };
        place.runs_script(clock::now_ms());
        match place.load_library(&wrapped.text, replace, may).await? {
            Ok(()) => {
                let mut out = Vec::new();
                put_bulk(&mut out, wrapped.name.as_bytes());
                self.say(&out);
            }
            Err(text) => self.tell(&text),
        }
        Ok(())
    }

    async fn delete_library(&mut self, name: &[u8]) -> Result<(), DialError> {
        let Some(tenancy) = &self.tenancy else { return Ok(()) };
        match tenancy.place.delete_library(name).await? {
            Ok(()) => self.say(b"+OK\r\n"),
            Err(text) => self.tell(&text),
        }
        Ok(())
    }

    async fn flush_libraries(&mut self, words: &[&[u8]]) -> Result<(), DialError> {
        if words.len() > 1 {
            self.fail("ERR unknown subcommand or wrong number of arguments for 'FLUSH'. Try FUNCTION HELP.");
            return Ok(());
        }
        let mode = |word: &&[u8]| word.eq_ignore_ascii_case(b"SYNC") || word.eq_ignore_ascii_case(b"ASYNC");
        if !words.iter().all(mode) {
            self.fail("ERR FUNCTION FLUSH only supports SYNC|ASYNC option");
            return Ok(());
        }
        let Some(tenancy) = &self.tenancy else { return Ok(()) };
        tenancy.place.flush_libraries().await?;
        self.say(b"+OK\r\n");
        Ok(())
    }

    async fn list_libraries(&mut self, words: &[&[u8]]) -> Result<(), DialError> {
        let (mut pattern, mut code) = (None, false);
        let mut rest = words.iter();
        while let Some(word) = rest.next() {
            if !code && word.eq_ignore_ascii_case(b"WITHCODE") {
                code = true;
            } else if pattern.is_none() && word.eq_ignore_ascii_case(b"LIBRARYNAME") {
                pattern = rest.next();
                if pattern.is_none() {
                    self.fail("ERR library name argument was not given");
                    return Ok(());
                }
            } else {
                self.fail(&format!("ERR Unknown argument {}", String::from_utf8_lossy(word)));
                return Ok(());
            }
        }
        let Some(tenancy) = &self.tenancy else { return Ok(()) };
        let libraries = tenancy.place.libraries(pattern.copied().unwrap_or(b"*")).await?;
        let mut out = Vec::new();
        put_array(&mut out, libraries.len());
        for library in &libraries {
            self.put_library(library, code, &mut out);
        }
        self.say(&out);
        Ok(())
    }

    fn put_library(&self, library: &Library, code: bool, out: &mut Vec<u8>) {
        self.put_map(3 + usize::from(code), out);
        put_bulk(out, b"library_name");
        put_bulk(out, &library.name);
        put_bulk(out, b"engine");
        put_bulk(out, &library.engine);
        put_bulk(out, b"functions");
        put_array(out, library.functions.len());
        for function in &library.functions {
            self.put_map(3, out);
            put_bulk(out, b"name");
            put_bulk(out, &function.name);
            put_bulk(out, b"description");
            match &function.description {
                Some(text) => put_bulk(out, text),
                None => self.put_null(out),
            }
            put_bulk(out, b"flags");
            let mark = if self.version == Version::Three { b'~' } else { b'*' };
            put_head(out, mark, function.flags.len());
            function.flags.iter().for_each(|flag| put_status(out, &String::from_utf8_lossy(flag)));
        }
        if code {
            put_bulk(out, b"library_code");
            put_bulk(out, &library::original(&library.code).unwrap_or_default());
        }
    }

    async fn function_stats(&mut self) -> Result<(), DialError> {
        let Some(tenancy) = &self.tenancy else { return Ok(()) };
        let libraries = tenancy.place.libraries(b"*").await?;
        let functions: usize = libraries.iter().map(|library| library.functions.len()).sum();
        let mut out = Vec::new();
        self.put_map(2, &mut out);
        put_bulk(&mut out, b"running_script");
        // The server runs one at a time: none while it answers.
        self.put_null(&mut out);
        put_bulk(&mut out, b"engines");
        self.put_map(1, &mut out);
        put_bulk(&mut out, b"LUA");
        self.put_map(2, &mut out);
        for (name, count) in [(&b"libraries_count"[..], libraries.len()), (b"functions_count", functions)] {
            put_bulk(&mut out, name);
            put_integer(&mut out, i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.say(&out);
        Ok(())
    }

    fn put_map(&self, pairs: usize, out: &mut Vec<u8>) {
        match self.version {
            Version::Two => put_array(out, pairs * 2),
            Version::Three => put_head(out, b'%', pairs),
        }
    }

    fn put_null(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(if self.version == Version::Three { b"_\r\n" } else { b"$-1\r\n" });
    }
}

fn too_long() -> String {
    format!(
        "OOM the code of a tenant's function libraries has at most {} KB together; delete some",
        CODE_MAX_BYTES >> 10
    )
}
