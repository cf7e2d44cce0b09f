//! A tenant's next credentials: its ACL user has both passwords while they change. Open connections keep going: Redis
//! asks for a password only when one logs in.

use std::sync::Arc;

use super::{DialError, Upstream, dial::refused};
use crate::{tenant::OrgId, wire::resp::put_request};

/// The generations whose passwords let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Valid {
    /// This one beside those that do already.
    Also(u32),
    /// This one alone.
    Only(u32),
}

impl Upstream {
    /// Says which passwords of a tenant let in. A user that the server does not know is left: whoever comes as it next
    /// makes it.
    ///
    /// # Errors
    /// The server can't be reached or refuses the platform.
    pub async fn set_valid(self: &Arc<Self>, org: &OrgId, valid: Valid) -> Result<(), DialError> {
        let user = self.names.redis(org).user;
        let password = |generation| format!(">{}", self.names.password("redis", org, generation).expose());
        let mut ask = Vec::new();
        put_request(&mut ask, &[b"ACL", b"GETUSER", user.as_bytes()]);
        let known = self.platform_for(org, &ask, 1).await?;
        refused(&known[0])?;
        // Nil in either protocol.
        if known[0].starts_with(b"*-1") || known[0].starts_with(b"$-1") || known[0].starts_with(b"_") {
            return Ok(());
        }
        let mut ask = Vec::new();
        match valid {
            Valid::Also(next) => {
                put_request(&mut ask, &[b"ACL", b"SETUSER", user.as_bytes(), password(next).as_bytes()]);
            }
            Valid::Only(one) => {
                let word = password(one);
                put_request(&mut ask, &[b"ACL", b"SETUSER", user.as_bytes(), b"resetpass", word.as_bytes()]);
            }
        }
        let answer = self.platform_for(org, &ask, 1).await?;
        refused(&answer[0])
    }
}
