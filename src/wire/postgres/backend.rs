//! Messages from servers: reading the few that matter, writing those that we answer ourselves.

use super::{super::Error, HEAD, cstr, put, put_cstr};

/// ParseComplete.
pub const PARSE_COMPLETE: [u8; 5] = [b'1', 0, 0, 0, 4];
/// CloseComplete.
pub const CLOSE_COMPLETE: [u8; 5] = [b'3', 0, 0, 0, 4];
/// AuthenticationOk.
pub const AUTHENTICATION_OK: [u8; 9] = [b'R', 0, 0, 0, 8, 0, 0, 0, 0];
/// AuthenticationCleartextPassword.
pub const AUTHENTICATION_CLEARTEXT: [u8; 9] = [b'R', 0, 0, 0, 8, 0, 0, 0, 3];

/// The transaction status in ReadyForQuery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not in a transaction.
    Idle,
    /// In a transaction.
    Transaction,
    /// In a failed transaction.
    Failed,
}

impl Status {
    /// Its byte on the wire.
    pub fn byte(self) -> u8 {
        match self {
            Status::Idle => b'I',
            Status::Transaction => b'T',
            Status::Failed => b'E',
        }
    }
}

/// Reads a whole ReadyForQuery.
///
/// # Errors
/// Another length or status byte than there are.
pub fn ready(message: &[u8]) -> Result<Status, Error> {
    match message {
        [b'Z', 0, 0, 0, 5, b'I'] => Ok(Status::Idle),
        [b'Z', 0, 0, 0, 5, b'T'] => Ok(Status::Transaction),
        [b'Z', 0, 0, 0, 5, b'E'] => Ok(Status::Failed),
        _ => Err(Error::new("ReadyForQuery", "invalid status")),
    }
}

/// ReadyForQuery.
pub fn ready_message(status: Status) -> [u8; 6] {
    [b'Z', 0, 0, 0, 5, status.byte()]
}

/// Reads a whole ParameterStatus: name and value.
///
/// # Errors
/// Missing terminators.
pub fn parameter(message: &[u8]) -> Result<(&[u8], &[u8]), Error> {
    let read = || {
        let (name, rest) = cstr(&message[HEAD..])?;
        let (value, rest) = cstr(rest)?;
        rest.is_empty().then_some((name, value))
    };
    read().ok_or(Error::new("ParameterStatus", "invalid string in message"))
}

/// Appends a ParameterStatus.
pub fn put_parameter(out: &mut Vec<u8>, name: &str, value: &str) {
    put(out, b'S', |out| {
        put_cstr(out, name.as_bytes());
        put_cstr(out, value.as_bytes());
    });
}

/// The tag of a whole CommandComplete.
///
/// # Errors
/// No terminator at its end.
pub fn tag(message: &[u8]) -> Result<&[u8], Error> {
    match cstr(&message[HEAD..]) {
        Some((tag, [])) => Ok(tag),
        _ => Err(Error::new("CommandComplete", "invalid string in message")),
    }
}

/// One field of an ErrorResponse or NoticeResponse. Tolerates servers that leave fields out.
pub fn field(message: &[u8], wanted: u8) -> Option<&[u8]> {
    let mut body = message.get(HEAD..)?;
    loop {
        let (&kind, rest) = body.split_first()?;
        if kind == 0 {
            return None;
        }
        let (value, rest) = cstr(rest)?;
        if kind == wanted {
            return Some(value);
        }
        body = rest;
    }
}

/// How grave an [`Report`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The statement failed; the session goes on.
    Error,
    /// The session ends.
    Fatal,
    /// Nothing failed.
    Notice,
}

/// An ErrorResponse or NoticeResponse of our own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Error, fatal or notice.
    pub severity: Severity,
    /// SQLSTATE.
    pub code: &'static str,
    /// The message.
    pub message: String,
    /// Detail, empty for none.
    pub detail: String,
    /// Hint, empty for none.
    pub hint: String,
}

impl Report {
    /// Appends it to `out`.
    pub fn put(&self, out: &mut Vec<u8>) {
        let (kind, severity) = match self.severity {
            Severity::Error => (b'E', "ERROR"),
            Severity::Fatal => (b'E', "FATAL"),
            Severity::Notice => (b'N', "NOTICE"),
        };
        put(out, kind, |out| {
            let fields = [(b'S', severity), (b'V', severity), (b'C', self.code), (b'M', &self.message)];
            let optional = [(b'D', self.detail.as_str()), (b'H', self.hint.as_str())];
            for (field, value) in fields.into_iter().chain(optional.into_iter().filter(|(_, v)| !v.is_empty())) {
                out.push(field);
                put_cstr(out, value.as_bytes());
            }
            out.push(0);
        });
    }
}

/// Appends BackendKeyData.
pub fn put_key(out: &mut Vec<u8>, pid: u32, secret: &[u8]) {
    put(out, b'K', |out| {
        out.extend_from_slice(&pid.to_be_bytes());
        out.extend_from_slice(secret);
    });
}

/// Appends NegotiateProtocolVersion: the newest minor version we speak and the extensions we don't know.
pub fn put_negotiate(out: &mut Vec<u8>, minor: u16, extensions: &[String]) {
    put(out, b'v', |out| {
        out.extend_from_slice(&((3u32 << 16) | u32::from(minor)).to_be_bytes());
        out.extend_from_slice(&u32::try_from(extensions.len()).unwrap_or(0).to_be_bytes());
        extensions.iter().for_each(|name| put_cstr(out, name.as_bytes()));
    });
}

/// Appends AuthenticationSASL with its mechanisms.
pub fn put_sasl(out: &mut Vec<u8>, mechanisms: &[&str]) {
    put(out, b'R', |out| {
        out.extend_from_slice(&10u32.to_be_bytes());
        mechanisms.iter().for_each(|name| put_cstr(out, name.as_bytes()));
        out.push(0);
    });
}

/// Appends AuthenticationSASLContinue.
pub fn put_sasl_continue(out: &mut Vec<u8>, data: &[u8]) {
    put(out, b'R', |out| {
        out.extend_from_slice(&11u32.to_be_bytes());
        out.extend_from_slice(data);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_back() {
        let report = Report {
            severity: Severity::Fatal,
            code: "53300",
            message: "too many".into(),
            detail: String::new(),
            hint: "wait".into(),
        };
        let mut out = Vec::new();
        report.put(&mut out);
        assert_eq!(field(&out, b'C'), Some(&b"53300"[..]));
        assert_eq!(field(&out, b'H'), Some(&b"wait"[..]));
        assert_eq!(field(&out, b'D'), None);
    }

    #[test]
    fn a_server_that_leaves_out_the_code_does_not_hurt() {
        assert_eq!(field(b"E\0\0\0\x09SERROR\0", b'C'), None);
        assert_eq!(field(b"E\0\0\0\x04", b'C'), None);
        assert_eq!(field(b"E", b'C'), None);
    }

    #[test]
    fn ready_has_three_faces() {
        assert_eq!(ready(&ready_message(Status::Failed)), Ok(Status::Failed));
        assert!(ready(b"Z\0\0\0\x05X").is_err());
        assert!(ready(b"Z\0\0\0\x06II").is_err());
    }
}
