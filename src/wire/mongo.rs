//! MongoDB's wire protocol.
//!
//! [`bson`] walks and writes documents in place.

pub mod bson;
