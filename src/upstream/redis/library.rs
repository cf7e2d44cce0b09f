//! A tenant's libraries of functions on the server, which are known there by names with the tenant's mark: loaded, told
//! and deleted by the platform's user, since no ACL divides them. Functions run as the tenant's own user.
//!
//! In a cluster each master has them all: a tenant's slot may move, and functions don't move with it. What is told is
//! what the master of the tenant's slot holds.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    MOVING_PAUSE, PLATFORM_TIMEOUT, Place,
    again::Elsewhere,
    dial::{self, DialError},
};
use crate::wire::resp::{Cursor, Item, put_array, put_bulk, put_request};

/// How often a library is loaded anew because others of the same tenant changed theirs at the same time.
const TRIES_MAX: usize = 8;

/// How many times as long as one command about a tenant's libraries took its next one waits: compiling code and looking
/// through all tenants' libraries keep the server from everybody.
const REST: u32 = 4;

/// The longest such pause.
const REST_MAX: Duration = Duration::from_secs(1);

/// How long a change is remembered so that others notice it, in seconds: far longer than one takes.
const NOTICE_SECONDS: &[u8] = b"300";

/// A library as the server tells it, its names without the mark.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Library {
    /// Its name.
    pub name: Vec<u8>,
    /// Its engine.
    pub engine: Vec<u8>,
    /// Its functions.
    pub functions: Vec<Function>,
    /// What was loaded.
    pub code: Vec<u8>,
}

/// One function.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: Vec<u8>,
    /// What it does, if its library says so.
    pub description: Option<Vec<u8>>,
    /// `no-writes` and the like.
    pub flags: Vec<Vec<u8>>,
}

/// The server's own answer to a command: nothing, or its error.
pub type Answer = Result<(), String>;

impl Place {
    /// Whether the server has functions at all.
    async fn has_functions(&self) -> Result<bool, DialError> {
        Ok(self.upstream.server().await?.commands.contains("function|list"))
    }

    /// One at a time, with a rest in between.
    async fn in_turn<T>(&self, work: impl Future<Output = T>) -> T {
        let mut turn = self.libraries_turn.lock().await;
        tokio::time::sleep_until(*turn).await;
        let begun = Instant::now();
        let result = work.await;
        *turn = Instant::now() + (begun.elapsed() * REST).min(REST_MAX);
        result
    }

    fn list(&self, pattern: &[u8]) -> Vec<u8> {
        let mark = self.space.function_mark().as_bytes();
        let mut ask = Vec::new();
        // The mark holds no glob character, so it is literal inside a pattern.
        put_request(&mut ask, &[b"FUNCTION", b"LIST", b"LIBRARYNAME", &[mark, pattern].concat(), b"WITHCODE"]);
        ask
    }

    /// The tenant's libraries whose names match a pattern.
    ///
    /// # Errors
    /// The server can't be asked, or is busy.
    pub async fn libraries(&self, pattern: &[u8]) -> Result<Vec<Library>, DialError> {
        if !self.has_functions().await? {
            return Ok(Vec::new());
        }
        let answers = self.in_turn(self.ask(&self.list(pattern), 1)).await?;
        parse(&answers[0], self.space.function_mark())
    }

    /// Loads a library. `may` looks at those that the tenant has before: nobody else's change comes between.
    ///
    /// # Errors
    /// The server can't be asked. The library may have been loaded.
    ///
    /// # Cancel safety
    /// The same.
    pub async fn load_library(
        &self,
        text: &[u8],
        replace: bool,
        may: impl Fn(&[Library]) -> Answer + Send + Sync,
    ) -> Result<Answer, DialError> {
        let load = async {
            for _ in 0..TRIES_MAX {
                let address = self.upstream.nodes.address(self.slot).await?;
                match self.load_at(&address, text, replace, &may).await? {
                    Some(Ok(())) => return self.load_elsewhere(&address, text).await,
                    Some(Err(refused)) => return Ok(Err(refused)),
                    None => tokio::time::sleep(MOVING_PAUSE).await,
                }
            }
            Err(DialError::Slow)
        };
        let load = tokio::time::timeout(PLATFORM_TIMEOUT, load);
        self.in_turn(load).await.unwrap_or(Err(DialError::Slow))
    }

    /// One attempt at the master of the tenant's slot; `None` if it has to be made again.
    async fn load_at(
        &self,
        address: &Arc<str>,
        text: &[u8],
        replace: bool,
        may: &(impl Fn(&[Library]) -> Answer + Send + Sync),
    ) -> Result<Option<Answer>, DialError> {
        let key = self.space.libraries();
        let mut stream = self.upstream.nodes.target().platform(address).await.inspect_err(|_| self.failed(address))?;
        let mut ask = Vec::new();
        put_request(&mut ask, &[b"WATCH", key.as_bytes()]);
        ask.extend(self.list(b"*"));
        let answers = dial::exchange(&mut stream, &ask, 2).await?;
        if Elsewhere::parse(&answers[0], address, self.slot).is_some() {
            self.doubt(address);
            return Ok(None);
        }
        dial::refused(&answers[0])?;
        if let Err(refused) = may(&parse(&answers[1], self.space.function_mark())?) {
            return Ok(Some(Err(refused)));
        }
        let mut ask = Vec::new();
        put_request(&mut ask, &[b"MULTI"]);
        put_load(&mut ask, text, replace);
        put_request(&mut ask, &[b"SET", key.as_bytes(), b"1", b"EX", NOTICE_SECONDS]);
        put_request(&mut ask, &[b"EXEC"]);
        let answers = dial::exchange(&mut stream, &ask, 4).await?;
        if answers[3].starts_with(b"*-1") || answers[3].starts_with(b"_") {
            return Ok(None);
        }
        // A command that could not be queued says why; the end of it says only that there was one.
        answers.iter().try_for_each(|answer| dial::refused(answer))?;
        let mut cursor = Cursor { rest: &answers[3] };
        cursor.item();
        Ok(Some(answer(cursor.whole().unwrap_or_default())))
    }

    async fn load_elsewhere(&self, done: &Arc<str>, text: &[u8]) -> Result<Answer, DialError> {
        let mut ask = Vec::new();
        put_load(&mut ask, text, true);
        for address in self.upstream.nodes.masters().iter().filter(|address| *address != done) {
            let answers = self.upstream.platform_at(address, &ask, 1).await;
            let told = answers.and_then(|answers| dial::refused(&answers[0]));
            if let Err(error) = told {
                tracing::warn!(%address, %error, "a library is not at every node");
                return Ok(Err(
                    "ERR the library is not at every node of the cluster; load it again with REPLACE".into()
                ));
            }
        }
        Ok(Ok(()))
    }

    /// Deletes a library.
    ///
    /// # Errors
    /// The server can't be asked. It may have been deleted, in a cluster from some nodes.
    pub async fn delete_library(&self, name: &[u8]) -> Result<Answer, DialError> {
        self.in_turn(self.delete(name)).await
    }

    async fn delete(&self, name: &[u8]) -> Result<Answer, DialError> {
        let mark = self.space.function_mark().as_bytes();
        let mut ask = Vec::new();
        put_request(&mut ask, &[b"FUNCTION", b"DELETE", &[mark, name].concat()]);
        let told = answer(&self.ask(&ask, 1).await?[0]);
        let owner = self.upstream.nodes.address(self.slot).await?;
        for address in self.upstream.nodes.masters().iter().filter(|address| **address != owner) {
            // Where it is not, it need not be deleted.
            self.upstream.platform_at(address, &ask, 1).await?;
        }
        Ok(told)
    }

    /// Deletes all of the tenant's libraries, at each server in one step.
    ///
    /// # Errors
    /// The server can't be asked. In a cluster they may have been deleted from some nodes.
    pub async fn flush_libraries(&self) -> Result<(), DialError> {
        if !self.has_functions().await? {
            return Ok(());
        }
        self.in_turn(self.flush()).await
    }

    async fn flush(&self) -> Result<(), DialError> {
        self.upstream.nodes.address(self.slot).await?;
        let mark = self.space.function_mark();
        for address in self.upstream.nodes.masters() {
            let answers = self.upstream.platform_at(&address, &self.list(b"*"), 1).await?;
            let libraries = parse(&answers[0], mark)?;
            if libraries.is_empty() {
                continue;
            }
            let mut ask = Vec::new();
            put_request(&mut ask, &[b"MULTI"]);
            for library in &libraries {
                put_request(&mut ask, &[b"FUNCTION", b"DELETE", &[mark.as_bytes(), &library.name].concat()]);
            }
            put_request(&mut ask, &[b"EXEC"]);
            let answers = self.upstream.platform_at(&address, &ask, libraries.len() + 2).await?;
            answers.iter().try_for_each(|answer| dial::refused(answer))?;
        }
        Ok(())
    }
}

fn put_load(out: &mut Vec<u8>, text: &[u8], replace: bool) {
    put_array(out, 3 + usize::from(replace));
    put_bulk(out, b"FUNCTION");
    put_bulk(out, b"LOAD");
    if replace {
        put_bulk(out, b"REPLACE");
    }
    put_bulk(out, text);
}

/// What a reply says: nothing, or an error, on one line.
fn answer(reply: &[u8]) -> Answer {
    match dial::refused(reply) {
        Err(DialError::Refused(text)) => Err(text),
        _ => Ok(()),
    }
}

/// Reads the reply of `FUNCTION LIST … WITHCODE`. Libraries without the mark are not the tenant's, and left out.
fn parse(reply: &[u8], mark: &str) -> Result<Vec<Library>, DialError> {
    dial::refused(reply)?;
    read(reply, mark.as_bytes()).ok_or_else(|| DialError::Refused("FUNCTION LIST gave something else".to_owned()))
}

fn read(reply: &[u8], mark: &[u8]) -> Option<Vec<Library>> {
    let mut cursor = Cursor { rest: reply };
    let mut libraries = Vec::new();
    for _ in 0..many(&mut cursor)? {
        let mut library = Library::default();
        let mut own = false;
        for _ in 0..many(&mut cursor)? / 2 {
            match bulk(&mut cursor)? {
                b"library_name" => {
                    let name = bulk(&mut cursor)?;
                    own = name.starts_with(mark);
                    library.name = name.strip_prefix(mark).unwrap_or(name).to_vec();
                }
                b"engine" => library.engine = bulk(&mut cursor)?.to_vec(),
                b"library_code" => library.code = bulk(&mut cursor)?.to_vec(),
                b"functions" => {
                    for _ in 0..many(&mut cursor)? {
                        library.functions.push(function(&mut cursor, mark)?);
                    }
                }
                _ => drop(cursor.whole()?),
            }
        }
        if own {
            libraries.push(library);
        }
    }
    Some(libraries)
}

fn function(cursor: &mut Cursor<'_>, mark: &[u8]) -> Option<Function> {
    let mut function = Function::default();
    for _ in 0..many(cursor)? / 2 {
        match bulk(cursor)? {
            b"name" => {
                let name = bulk(cursor)?;
                function.name = name.strip_prefix(mark).unwrap_or(name).to_vec();
            }
            b"description" => {
                function.description = match cursor.item()? {
                    Item::Bulk(text) => Some(text.to_vec()),
                    _ => None,
                };
            }
            b"flags" => {
                for _ in 0..many(cursor)? {
                    function.flags.push(match cursor.item()? {
                        Item::Bulk(text) => text.to_vec(),
                        Item::Other(text) => text.strip_prefix(b"+")?.trim_ascii_end().to_vec(),
                        Item::Many(..) => return None,
                    });
                }
            }
            _ => drop(cursor.whole()?),
        }
    }
    Some(function)
}

/// The elements of an array; a map counts each of its keys and values.
fn many(cursor: &mut Cursor<'_>) -> Option<usize> {
    match cursor.item()? {
        Item::Many(_, count) => Some(count),
        _ => None,
    }
}

fn bulk<'a>(cursor: &mut Cursor<'a>) -> Option<&'a [u8]> {
    match cursor.item()? {
        Item::Bulk(text) => Some(text),
        Item::Other(text) => Some(text.strip_prefix(b"+")?.trim_ascii_end()),
        Item::Many(..) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_holds_the_tenants_own_libraries() {
        let mut reply = b"*2\r\n".to_vec();
        for name in ["m_lib", "n_lib"] {
            reply.extend_from_slice(b"*8\r\n$12\r\nlibrary_name\r\n");
            put_bulk(&mut reply, name.as_bytes());
            reply.extend_from_slice(b"$6\r\nengine\r\n$3\r\nLUA\r\n$9\r\nfunctions\r\n*1\r\n*6\r\n$4\r\nname\r\n");
            reply.extend_from_slice(b"$3\r\nm_f\r\n$11\r\ndescription\r\n$-1\r\n$5\r\nflags\r\n*1\r\n+no-writes\r\n");
            reply.extend_from_slice(b"$12\r\nlibrary_code\r\n$1\r\nc\r\n");
        }
        let function = Function { name: b"f".to_vec(), description: None, flags: vec![b"no-writes".to_vec()] };
        let expected =
            Library { name: b"lib".to_vec(), engine: b"LUA".to_vec(), functions: vec![function], code: b"c".to_vec() };
        assert_eq!(parse(&reply, "m_").expect("a list"), [expected]);
        for cut in 0..reply.len() {
            let _ = read(&reply[..cut], b"m_");
        }
        assert!(parse(b"-ERR x\r\n", "m_").is_err() && parse(b":1\r\n", "m_").is_err());
    }
}
