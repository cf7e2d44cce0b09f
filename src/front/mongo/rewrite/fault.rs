//! Refusals in the server's terms.

use super::Fault;

impl Fault {
    /// A fault of the whole command.
    pub fn new(code: i32, name: &'static str, message: impl Into<String>) -> Self {
        Self { code, name, message: message.into(), failed: Vec::new() }
    }

    /// No such command.
    pub fn unknown_command(name: &str) -> Self {
        Self::new(59, "CommandNotFound", format!("no such command: '{name}'"))
    }
}
