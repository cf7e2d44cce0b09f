//! Becoming a tenant on a server: its ACL user, and connections that are logged in as it.

use std::sync::Arc;

use super::{
    Database, Place, Version,
    dial::{self, CONNECT_TIMEOUT, DialError},
};
use crate::{
    net::Stream,
    tenant::namespace::Password,
    wire::resp::{put_array, put_bulk, put_request},
};

/// What an ACL can't confine to the tenant's keys where its database is not its own.
const WHOLE: [&str; 5] = ["keys", "scan", "randomkey", "dbsize", "flushdb"];

/// Rotations that a place without new sessions may have missed; after more it makes the user anew.
const ROTATIONS_MISSED_MAX: u32 = 3;

fn is_wrong_password<T>(result: &Result<T, DialError>) -> bool {
    matches!(result, Err(DialError::Refused(text)) if text.starts_with("WRONGPASS"))
}

impl Place {
    /// Makes the ACL user on one server, or replaces its rules and password.
    pub(super) async fn set_user(&self, address: &Arc<str>) -> Result<(), DialError> {
        let server = self.upstream.server().await?;
        let password = self.password(self.generation());
        let mut rules: Vec<String> = ["reset", "on", "resetchannels", "-@all"].map(str::to_owned).into();
        rules.push(format!(">{}", password.expose()));
        rules.extend(self.space.key_patterns());
        rules.push(self.space.channel_pattern());
        // A user may be exempt from the server's look into its payloads.
        rules.push("sanitize-payload".to_owned());
        let known = self.upstream.allowed.iter().filter(|name| {
            server.commands.contains(**name)
                && !(self.is_shared() && WHOLE.contains(name))
                && (server.sanitizes || **name != "restore")
        });
        rules.extend(known.map(|name| format!("+{name}")));
        let mut ask = Vec::new();
        put_array(&mut ask, 3 + rules.len());
        [&b"ACL"[..], b"SETUSER", self.space.user.as_bytes()].iter().for_each(|word| put_bulk(&mut ask, word));
        rules.iter().for_each(|rule| put_bulk(&mut ask, rule.as_bytes()));
        let answer = self.upstream.platform_at(address, &ask, 1).await?;
        dial::refused(&answer[0])?;
        let mut users = self.users.lock();
        if !users.contains(address) {
            users.push(Arc::clone(address));
        }
        Ok(())
    }

    fn password(&self, generation: u32) -> Password {
        self.upstream.names.password("redis", &self.org, generation)
    }

    /// Connects as the platform, goes into the database, becomes the tenant's user: one round trip. A user that the
    /// server has forgotten (it was restarted without its ACL file) is made again.
    /// `first` is a request that the platform's user runs before, if it is not empty; its answer comes back.
    pub(super) async fn log_in(
        &self,
        database: &Database,
        version: Version,
        first: &[u8],
    ) -> Result<(Stream, Arc<str>, Vec<u8>), DialError> {
        let address = self.upstream.nodes.address(self.slot).await?;
        let (stream, answer) = self.log_in_at(&address, Some(database), version, first).await?;
        Ok((stream, address, answer))
    }

    /// A connection to another node for one command.
    pub(super) async fn visit(&self, address: &Arc<str>, version: Version) -> Result<Stream, DialError> {
        Ok(self.log_in_at(address, None, version, &[]).await?.0)
    }

    async fn log_in_at(
        &self,
        address: &Arc<str>,
        database: Option<&Database>,
        version: Version,
        first: &[u8],
    ) -> Result<(Stream, Vec<u8>), DialError> {
        let target = self.upstream.nodes.target();
        let database = database.filter(|database| database.alone);
        let index = database.map_or(0, |database| database.index).to_string();
        let attempt = async |password: Password| {
            let mut stream = target.reach(address).await?;
            let mut hello = Vec::new();
            let mut replies = target.put_login(&mut hello);
            put_request(&mut hello, &[b"SELECT", index.as_bytes()]);
            put_request(&mut hello, &[b"DBSIZE"]);
            hello.extend_from_slice(first);
            let user = self.space.user.as_bytes();
            match version {
                Version::Two => put_request(&mut hello, &[b"AUTH", user, password.expose().as_bytes()]),
                Version::Three => {
                    put_request(&mut hello, &[b"HELLO", b"3", b"AUTH", user, password.expose().as_bytes()]);
                }
            }
            replies += 3;
            let extra = usize::from(!first.is_empty());
            let mark = database.map(|database| database.ledger.mark());
            let mut answers = dial::exchange(&mut stream, &hello, replies + extra).await?;
            let answer = if extra > 0 { answers.remove(replies - 1) } else { Vec::new() };
            answers.iter().try_for_each(|answer| dial::refused(answer))?;
            let keys = answers.get(replies - 2).and_then(|answer| dial::integer(answer));
            if let (Some(keys), Some(database), Some(mark)) = (keys.and_then(|n| u64::try_from(n).ok()), database, mark)
            {
                database.ledger.counted(keys, mark);
            }
            Ok((stream, answer))
        };
        let bounded = async |generation| {
            let attempt = attempt(self.password(generation));
            tokio::time::timeout(CONNECT_TIMEOUT, attempt).await.unwrap_or(Err(DialError::Slow))
        };
        // A server that has taken another's place has no users, or old ones.
        if self.upstream.nodes.may_change() && !self.users.lock().contains(address) {
            self.set_user(address).await?;
        }
        let mut result = bounded(self.generation()).await;
        if is_wrong_password(&result) {
            // The credentials may have been rotated since this place was made: that must not be taken back.
            let known = self.generation();
            for later in 1..=ROTATIONS_MISSED_MAX {
                result = bounded(known.saturating_add(later)).await;
                if !is_wrong_password(&result) {
                    self.follow(known.saturating_add(later));
                    break;
                }
            }
        }
        if is_wrong_password(&result) {
            self.set_user(address).await?;
            result = bounded(self.generation()).await;
        }
        if result.is_err() {
            self.failed(address);
        }
        result
    }
}
