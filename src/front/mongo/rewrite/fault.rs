//! Refusals in the server's terms.

use super::{Failed, Fault};
use crate::wire;

impl Fault {
    /// A fault of the whole command.
    pub fn new(code: i32, name: &'static str, message: impl Into<String>) -> Self {
        Self { code, name, message: message.into(), failed: Vec::new(), bulk: false }
    }

    /// Statements that were refused, and nothing else to be sent.
    pub(super) fn statements(failed: Vec<Failed>, bulk: bool) -> Self {
        Self { failed, bulk, ..Self::new(66, "ImmutableField", "no statement can be executed") }
    }

    /// No such command.
    pub fn unknown_command(name: &str) -> Self {
        Self::new(59, "CommandNotFound", format!("no such command: '{name}'"))
    }

    /// It exists; tenants may not.
    pub(super) fn forbidden(what: impl std::fmt::Display) -> Self {
        Self::new(13, "Unauthorized", format!("{what} is not available here"))
    }

    /// JavaScript runs nowhere.
    pub(super) fn javascript(what: &str) -> Self {
        Self::new(13, "Unauthorized", format!("{what} is not available here: JavaScript is switched off"))
    }

    pub(super) fn unknown_field(at: &str, field: &[u8]) -> Self {
        let field = String::from_utf8_lossy(field);
        Self::new(40415, "IDLUnknownField", format!("BSON field '{at}.{field}' is an unknown field."))
    }

    pub(super) fn missing(at: &str, field: &str) -> Self {
        Self::new(40414, "IDLFailedToParse", format!("BSON field '{at}.{field}' is missing but a required field"))
    }

    pub(super) fn duplicate(at: &str, field: &[u8]) -> Self {
        let field = String::from_utf8_lossy(field);
        Self::new(40413, "IDLDuplicateField", format!("BSON field '{at}.{field}' is a duplicate field"))
    }

    pub(super) fn wrong_type(at: &str, field: &[u8], expected: &str) -> Self {
        let field = String::from_utf8_lossy(field);
        Self::new(
            14,
            "TypeMismatch",
            format!("BSON field '{at}.{field}' is the wrong type, expected type '{expected}'"),
        )
    }

    pub(super) fn bad_value(message: impl Into<String>) -> Self {
        Self::new(2, "BadValue", message)
    }

    pub(super) fn failed_to_parse(message: impl Into<String>) -> Self {
        Self::new(9, "FailedToParse", message)
    }

    pub(super) fn unknown_stage(name: &[u8]) -> Self {
        let name = String::from_utf8_lossy(name);
        Self::new(40324, "Location40324", format!("Unrecognized pipeline stage name: '{name}'"))
    }

    pub(super) fn namespace(message: impl Into<String>) -> Self {
        Self::new(73, "InvalidNamespace", message)
    }

    /// `org_id` is not the tenant's to write.
    pub(super) fn immutable() -> Self {
        Self::new(
            66,
            "ImmutableField",
            "Performing an update on the path 'org_id' would modify the immutable field 'org_id'",
        )
    }

    pub(super) fn too_large(bytes: usize) -> Self {
        let max = super::DOCUMENT_MAX;
        Self::new(
            10334,
            "BSONObjectTooLarge",
            format!("BSONObj size: {bytes} is invalid. Size must be between 0 and {max}; org_id is counted"),
        )
    }

    pub(super) fn message_too_large(bytes: usize) -> Self {
        let max = crate::wire::mongo::MESSAGE_MAX_BYTES;
        Self::new(
            10334,
            "BSONObjectTooLarge",
            format!("message size: {bytes} is invalid, as org_id is counted. It must be between 0 and {max}"),
        )
    }

    pub(super) fn too_deep() -> Self {
        Self::new(15, "Overflow", format!("exceeded depth limit: more than {} levels", super::DEPTH_MAX))
    }

    /// Whether one statement has this fault while the others may run, as the server has it: what is wrong with the
    /// request itself (types, unknown fields, malformed bytes) concerns all of it.
    pub(super) fn concerns_statement(&self) -> bool {
        matches!(self.code, 2 | 9 | 13 | 15 | 52 | 66 | 72 | 168 | 10334)
    }
}

impl From<wire::Error> for Fault {
    fn from(error: wire::Error) -> Self {
        Self::new(22, "InvalidBSON", error.to_string())
    }
}
