//! OP_COMPRESSED: opened before anything is looked at, its claimed size checked before anything is allocated.

use std::io::{Read, Write};

use super::{Error, HEADER_BYTES, OP_COMPRESSED, begin, end};

/// Bytes between the header and the compressed data.
const HEAD_BYTES: usize = 9;

/// Room that is made before data is inflated: a lying size must not cost its size.
const FIRST_ROOM_BYTES: usize = 256 << 10;

/// How hard replies are compressed: the lowest level of zlib and zstd that is worth it.
const LEVEL: i32 = 1;

const fn fault(what: &'static str) -> Error {
    Error::new("compressed message", what)
}

/// A way of compressing that drivers know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compressor {
    /// Not at all.
    Noop = 0,
    /// Snappy's block format.
    Snappy = 1,
    /// zlib.
    Zlib = 2,
    /// Zstandard.
    Zstd = 3,
}

impl Compressor {
    /// By the name in `compression`.
    pub fn by_name(name: &str) -> Option<Self> {
        match name {
            "snappy" => Some(Compressor::Snappy),
            "zlib" => Some(Compressor::Zlib),
            "zstd" => Some(Compressor::Zstd),
            _ => None,
        }
    }

    /// The name in `compression`.
    pub fn name(self) -> &'static str {
        match self {
            Compressor::Noop => "noop",
            Compressor::Snappy => "snappy",
            Compressor::Zlib => "zlib",
            Compressor::Zstd => "zstd",
        }
    }

    fn by_id(id: u8) -> Option<Self> {
        [Compressor::Noop, Compressor::Snappy, Compressor::Zlib, Compressor::Zstd]
            .into_iter()
            .find(|compressor| *compressor as u8 == id)
    }
}

/// What was inside.
#[derive(Debug, PartialEq, Eq)]
pub struct Opened {
    /// The opcode inside.
    pub opcode: i32,
    /// How it was compressed.
    pub compressor: Compressor,
}

/// Opens what follows the header of an OP_COMPRESSED: appends what followed the header inside to `out`.
///
/// # Errors
/// An unknown compressor, data that is not what it claims, or more than `max` bytes with a header.
pub fn open(payload: &[u8], max: usize, out: &mut Vec<u8>) -> Result<Opened, Error> {
    let (head, data) = payload.split_first_chunk::<HEAD_BYTES>().ok_or(fault("cut short"))?;
    let word = |at: usize| i32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let opcode = word(0);
    if opcode == OP_COMPRESSED {
        return Err(fault("compressed twice"));
    }
    let size = usize::try_from(word(4)).ok().filter(|size| size + HEADER_BYTES <= max);
    let size = size.ok_or(fault("longer than the cap"))?;
    let compressor = Compressor::by_id(head[8]).ok_or(fault("an unknown compressor"))?;
    let start = out.len();
    // One byte beyond shows that there is more than was claimed.
    let limit = size as u64 + 1;
    match compressor {
        Compressor::Noop => out.extend_from_slice(data),
        Compressor::Snappy => {
            if snap::raw::decompress_len(data).map_err(|_| fault("no snappy data"))? != size {
                return Err(fault("another length than claimed"));
            }
            // Snappy's best is 64 bytes out of 3: what claims more lies.
            if size / 32 > data.len() {
                return Err(fault("longer than its data can be"));
            }
            out.resize(start + size, 0);
            snap::raw::Decoder::new().decompress(data, &mut out[start..]).map_err(|_| fault("no snappy data"))?;
        }
        Compressor::Zlib => {
            out.reserve(size.min(FIRST_ROOM_BYTES));
            let read = flate2::read::ZlibDecoder::new(data).take(limit).read_to_end(out);
            read.map_err(|_| fault("no zlib data"))?;
        }
        Compressor::Zstd => {
            out.reserve(size.min(FIRST_ROOM_BYTES));
            let mut decoder = zstd::stream::read::Decoder::with_buffer(data).map_err(|_| fault("no zstd data"))?;
            // A window no larger than a message can use.
            decoder.window_log_max(26).map_err(|_| fault("no zstd data"))?;
            decoder.take(limit).read_to_end(out).map_err(|_| fault("no zstd data"))?;
        }
    }
    if out.len() - start != size {
        return Err(fault("another length than claimed"));
    }
    Ok(Opened { opcode, compressor })
}

/// Appends `message` (with its header) to `out` as an OP_COMPRESSED; as it is where compressing fails.
pub fn seal(message: &[u8], compressor: Compressor, out: &mut Vec<u8>) {
    let start = out.len();
    if put_sealed(message, compressor, out).is_none() {
        out.truncate(start);
        out.extend_from_slice(message);
    }
}

fn put_sealed(message: &[u8], compressor: Compressor, out: &mut Vec<u8>) -> Option<()> {
    let (header, data) = message.split_first_chunk::<HEADER_BYTES>()?;
    let word = |at: usize| i32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let at = begin(out, word(4), word(8), OP_COMPRESSED);
    out.extend_from_slice(&word(12).to_le_bytes());
    out.extend_from_slice(&i32::try_from(data.len()).ok()?.to_le_bytes());
    out.push(compressor as u8);
    match compressor {
        Compressor::Noop => out.extend_from_slice(data),
        Compressor::Snappy => out.extend(snap::raw::Encoder::new().compress_vec(data).ok()?),
        Compressor::Zlib => {
            let level = flate2::Compression::new(u32::try_from(LEVEL).ok()?);
            let mut encoder = flate2::write::ZlibEncoder::new(&mut *out, level);
            encoder.write_all(data).ok()?;
            encoder.finish().ok()?;
        }
        Compressor::Zstd => zstd::stream::copy_encode(data, &mut *out, LEVEL).ok()?,
    }
    end(out, at);
    Some(())
}
