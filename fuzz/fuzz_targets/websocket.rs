//! A WebSocket as a byte stream: whatever comes ends, and gives no more than was sent; what is cut into frames and
//! continuations at any place, with pings between them, comes out as it went in.
#![no_main]

use dynabase::net::{
    Raw, Stream,
    websocket::{FRAME_MAX, WebSocket, settings},
};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::Role};

/// Room for all that a target is given and all that it answers: nobody reads the answers.
const ROOM: usize = 1 << 20;

/// What a server reads of these bytes, and whether it was content to the end.
async fn read(sent: &[u8]) -> (Vec<u8>, bool) {
    let (mut client, server) = tokio::io::duplex(ROOM);
    let frames =
        WebSocketStream::from_raw_socket(Stream::Plain(Raw::Memory(server)), Role::Server, Some(settings(FRAME_MAX)))
            .await;
    let mut socket = Stream::WebSocket(Box::new(WebSocket::new(frames)));
    // The server may have ended before it has taken all.
    let _ = client.write_all(sent).await;
    let _ = client.shutdown().await;
    let mut got = Vec::new();
    let content = socket.read_to_end(&mut got).await.is_ok();
    (got, content)
}

/// One masked frame.
fn put(out: &mut Vec<u8>, first: u8, mask: [u8; 4], payload: &[u8]) {
    out.push(first);
    match payload.len() {
        len @ 0..126 => out.push(0x80 | len as u8),
        len => {
            out.push(0x80 | 126);
            out.extend_from_slice(&(len as u16).to_be_bytes());
        }
    }
    out.extend_from_slice(&mask);
    out.extend(payload.iter().enumerate().map(|(at, byte)| byte ^ mask[at % 4]));
}

/// The bytes as messages of several frames, cut where they themselves say.
fn framed(data: &[u8]) -> Vec<u8> {
    const FIN: u8 = 0x80;
    let (mut out, mut rest, mut is_inside) = (Vec::new(), data, false);
    while let Some(&cut) = rest.first() {
        let (part, left) = rest.split_at((usize::from(cut) * 3).clamp(1, rest.len()));
        let ends = left.is_empty() || cut & 1 == 1;
        let opcode = if is_inside { 0 } else { 2 };
        put(&mut out, opcode | if ends { FIN } else { 0 }, [cut, 7, cut ^ 0x5a, 0], part);
        is_inside = !ends;
        if cut & 2 == 2 {
            put(&mut out, FIN | 9, [1, 2, 3, cut], &part[..part.len().min(125)]);
        }
        rest = left;
    }
    put(&mut out, FIN | 8, [0; 4], &[]);
    out
}

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let (got, _) = read(data).await;
        assert!(got.len() <= data.len());
        let (got, content) = read(&framed(data)).await;
        assert!(content && got == data);
    });
});
