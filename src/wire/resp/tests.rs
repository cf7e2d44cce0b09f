use proptest::prelude::*;

use super::*;

fn parse(bytes: &[u8]) -> Result<(Progress, Vec<Arg>), Fault> {
    let mut request = Request::default();
    request.advance(bytes, ARGS_MAX, BULK_MAX).map(|progress| (progress, request.args))
}

#[test]
fn a_request_cut_at_any_byte_gives_the_same_arguments() {
    let bytes = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$11\r\nhello\r\n$1\r\n\r\n";
    let (whole, args) = parse(bytes).expect("valid");
    assert_eq!(whole, Progress::Complete(bytes.len()));
    for cut in 0..bytes.len() {
        let mut request = Request::default();
        assert_eq!(request.advance(&bytes[..cut], ARGS_MAX, BULK_MAX), Ok(Progress::Incomplete), "{cut}");
        assert_eq!(request.advance(bytes, ARGS_MAX, BULK_MAX), Ok(whole));
        assert_eq!(request.args, args);
    }
}

#[test]
fn hostile_lengths_are_refused_before_anything_is_allocated() {
    for bad in [
        &b"*99999999999999999999\r\n"[..],
        b"*2147483648\r\n",
        b"*1\r\n$536870913\r\n",
        b"*1\r\n$-1\r\n",
        b"*1\r\n:1\r\n",
        b"*1\r\n$ 1\r\na\r\n",
        b"*1\r\n$+1\r\na\r\n",
        b"*1\r\n$1\r\nabc",
        b"*1\r\n$1\nx",
        b"*\r\n",
        b"*1x\r\n",
        b"*01\r\n",
        b"*1\r\n$01\r\na\r\n",
    ] {
        assert!(parse(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
    }
    let mut request = Request::default();
    assert_eq!(
        request.advance(b"*11\r\n", ARGS_MAX_UNAUTHENTICATED, BULK_MAX_UNAUTHENTICATED),
        Err(Fault("unauthenticated multibulk length"))
    );
    assert_eq!(parse(&vec![b'a'; LINE_MAX]), Err(Fault("too big inline request")));
}

#[test]
fn empty_requests_are_complete_without_arguments() {
    assert_eq!(parse(b"*0\r\n"), Ok((Progress::Complete(4), vec![])));
    assert_eq!(parse(b"*-1\r\n"), Ok((Progress::Complete(5), vec![])));
    assert_eq!(parse(b"\r\n"), Ok((Progress::Inline(2), vec![])));
}

#[test]
fn inline_words_follow_redis_quoting() {
    let words = |text: &str| split_inline(text.as_bytes());
    assert_eq!(words("  SET a  'b c'\r\n"), Ok(vec![b"SET".to_vec(), b"a".to_vec(), b"b c".to_vec()]));
    assert_eq!(words(r#""\x41\n\"" 'it\'s'"#), Ok(vec![b"A\n\"".to_vec(), b"it's".to_vec()]));
    for bad in [r#""a"b"#, "'a", r#""a"#, "'a'b"] {
        assert!(words(bad).is_err(), "{bad}");
    }
}

#[test]
fn a_reply_of_a_hundred_thousand_nested_arrays_costs_no_stack() {
    let mut bytes = b"*1\r\n".repeat(100_000);
    bytes.extend_from_slice(b":1\r\n");
    assert_eq!(Reply::default().advance(&bytes), Ok((bytes.len(), true)));
}

#[test]
fn every_reply_type_is_walked() {
    let replies: [&[u8]; 14] = [
        b"+OK\r\n",
        b"-ERR x\r\n",
        b":1\r\n",
        b"$-1\r\n",
        b"*-1\r\n",
        b"$3\r\na\r\n\r\n",
        b"_\r\n",
        b",1.5\r\n",
        b"#t\r\n",
        b"(123\r\n",
        b"=7\r\ntxt:abc\r\n",
        b"%1\r\n+a\r\n*2\r\n:1\r\n:2\r\n",
        b"|1\r\n+ttl\r\n:1\r\n~2\r\n:1\r\n:2\r\n",
        b">2\r\n+invalidate\r\n*1\r\n$1\r\nk\r\n",
    ];
    for reply in replies {
        let mut followed = reply.to_vec();
        followed.extend_from_slice(b"+next\r\n");
        assert_eq!(Reply::default().advance(&followed), Ok((reply.len(), true)), "{reply:?}");
        for cut in 0..reply.len() {
            let mut state = Reply::default();
            let (used, done) = state.advance(&reply[..cut]).expect("a prefix of a reply");
            assert!(!done, "{cut} of {reply:?}");
            assert_eq!(state.advance(&followed[used..]), Ok((reply.len() - used, true)));
        }
    }
    assert!(Reply::default().advance(b"hello").is_err());
}

#[test]
fn the_rest_of_a_request_ends_where_the_request_does_wherever_it_is_cut() {
    let bytes = b"*4\r\n$4\r\nHSET\r\n$1\r\nk\r\n$5\r\n\r\n$1\r\r\n$12\r\nhello, world\r\n*1\r\n";
    let whole = bytes.len() - 4;
    for cut in 21..whole {
        let mut request = Request::default();
        assert_eq!(request.advance(&bytes[..cut], ARGS_MAX, BULK_MAX), Ok(Progress::Incomplete));
        assert_eq!(request.announced(), 4);
        let (head, rest) = request.rest();
        assert!(head <= cut && rest.announced <= 12);
        for second in cut..=bytes.len() {
            let mut rest = request.rest().1;
            let (used, done) = rest.advance(&bytes[head..second]).expect("well-formed");
            let at = head + used;
            assert_eq!(done, second >= whole, "{cut} {second}");
            if !done {
                assert!(second - at < 8, "only a header is left unwalked");
                assert_eq!(rest.advance(&bytes[at..]), Ok((whole - at, true)), "{cut} {second}");
            }
        }
    }
}

#[test]
fn a_broken_rest_is_found_before_its_last_byte() {
    let mut request = Request::default();
    let _ = request.advance(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$4\r\nab", ARGS_MAX, BULK_MAX);
    for broken in [&b"abcdx\n"[..], b"abcd\rx", b"abcd\n", b"abcde"] {
        let mut rest = request.rest().1;
        assert!(rest.advance(broken).is_err(), "{broken:?}");
        let mut rest = request.rest().1;
        assert!((0..broken.len()).any(|at| rest.advance(&broken[at..=at]).is_err()), "{broken:?}");
    }
    let _ = request.advance(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n", ARGS_MAX, BULK_MAX);
    request.reset();
    let _ = request.advance(b"*3\r\n$3\r\nSET\r\n", ARGS_MAX, BULK_MAX);
    for broken in [&b":1\r\n"[..], b"$01\r\na\r\n", b"$-1\r\n", b"$536870913\r\n"] {
        assert!(request.rest().1.advance(broken).is_err(), "{broken:?}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_walkers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&bytes);
        let _ = Reply::default().advance(&bytes);
        let _ = split_inline(&bytes);
        let mut cursor = Cursor { rest: &bytes };
        while cursor.item().is_some() {}
    }

    #[test]
    fn what_is_encoded_is_parsed(words in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 1..8)) {
        let mut out = Vec::new();
        put_request(&mut out, &words.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let (progress, args) = parse(&out).expect("valid");
        prop_assert_eq!(progress, Progress::Complete(out.len()));
        prop_assert_eq!(args.iter().map(|arg| arg.of(&out).to_vec()).collect::<Vec<_>>(), words);
    }
}
