//! What a client's frame is about.

use std::ops::Range;

use super::{
    super::Error,
    Caller, Client, Kind, MODIFICATIONS_MAX, Modification,
    json::{Cursor, Member, fault, of},
};

/// Peeks into a client's frame.
///
/// # Errors
/// It is no frame of the protocol, or one that two readers could understand in two ways.
pub fn client(text: &str) -> Result<Client<'_>, Error> {
    let mut cursor = Cursor::new(text);
    let members = cursor.members()?;
    cursor.end()?;
    let number = |key| of(text, &members, key, Cursor::number)?.ok_or(fault("a number is missing"));
    let string = |key| of(text, &members, key, Cursor::plain)?.ok_or(fault("a text is missing"));
    match string("type")? {
        "Connect" => Ok(Client::Connect {
            session: string("sessionId")?,
            connections: number("connectionCount")?,
            observed: members.iter().any(|member| member.key == OBSERVED),
        }),
        "Authenticate" => {
            let base = number("baseVersion")?;
            let caller = match string("tokenType")? {
                "User" => {
                    let token = string("value")?;
                    let start = token.as_ptr() as usize - text.as_ptr() as usize;
                    Caller::User { token, at: start..start + token.len() }
                }
                "None" => Caller::Nobody,
                "Admin" => Caller::Admin,
                _ => return Err(fault("an unknown type of token")),
            };
            Ok(Client::Authenticate { base, caller })
        }
        "ModifyQuerySet" => {
            let all = members.iter().find(|member| member.key == "modifications").map(|member| member.value.clone());
            let all = all.ok_or(fault("no modifications"))?;
            let elements = Cursor::at(text, &all).elements(MODIFICATIONS_MAX)?;
            let modifications = elements.into_iter().map(|all| modification(text, all)).collect::<Result<_, _>>()?;
            Ok(Client::ModifyQuerySet { base: number("baseVersion")?, new: number("newVersion")?, all, modifications })
        }
        kind @ ("Mutation" | "Action") => Ok(Client::Call {
            kind: if kind == "Mutation" { Kind::Mutation } else { Kind::Action },
            request: number("requestId")?,
            component: component(text, &members),
            args: args(&members)?,
        }),
        "Event" => Ok(Client::Event),
        _ => Err(fault("an unknown message")),
    }
}

/// The key under which `Connect` says which timestamp the client has seen.
pub(super) const OBSERVED: &str = "maxObservedTimestamp";

fn modification(text: &str, all: Range<usize>) -> Result<Modification, Error> {
    let members = Cursor::at(text, &all).members()?;
    let query = of(text, &members, "queryId", Cursor::number)?.ok_or(fault("a modification without queryId"))?;
    match of(text, &members, "type", Cursor::plain)? {
        Some("Add") => {
            Ok(Modification::Add { query, component: component(text, &members), args: args(&members)?, all })
        }
        Some("Remove") => Ok(Modification::Remove { query, all }),
        _ => Err(fault("an unknown modification")),
    }
}

fn component(text: &str, members: &[Member<'_>]) -> bool {
    members.iter().any(|member| member.key == "componentPath" && &text[member.value.clone()] != "null")
}

fn args(members: &[Member<'_>]) -> Result<Range<usize>, Error> {
    members.iter().find(|member| member.key == "args").map(|member| member.value.clone()).ok_or(fault("no args"))
}
