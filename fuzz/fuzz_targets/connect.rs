//! The authority of a CONNECT: what passes the gate leads to exactly one host
//! and port, the ones that are written there.
#![no_main]

use std::net::Ipv6Addr;

use libfuzzer_sys::fuzz_target;
use token_sidecar::fuzzing::judge_heads;
use tokio::runtime::Builder;

fuzz_target!(|target: &[u8]| {
    let head = [b"CONNECT ", target, b" HTTP/1.1\r\n\r\n"].concat();
    let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
    let judged = runtime.block_on(judge_heads(vec![head.clone()]));
    let Some(judged) = judged.into_iter().next() else {
        return;
    };
    if judged.status != 200 {
        assert!([400, 414, 431, 501].contains(&judged.status), "{}", judged.status);
        return;
    }
    let mut headers = [httparse::EMPTY_HEADER; 100];
    let mut request = httparse::Request::new(&mut headers);
    let parsed = request.parse(&head).expect("hyper took it");
    let written = request.path.expect("a target");
    let (host, port) = judged.address.expect("what passes leads somewhere");
    // The head ends where hyper says, even if the input holds another one.
    assert!(parsed.is_complete());
    let (written_host, written_port) = written.rsplit_once(':').expect("a port");
    assert_eq!(written_port.parse(), Ok(port), "{written}");
    assert!(written_port.bytes().all(|byte| byte.is_ascii_digit()), "{written}");
    assert_ne!(port, 0);
    assert!(!host.is_empty());
    assert!(host.chars().all(|c| c.is_ascii_graphic() && !c.is_ascii_uppercase()), "{host}");
    assert!(!host.contains(['@', '/', '?', '#', '[', ']', '\\']), "{written}");
    match written_host.strip_prefix('[') {
        Some(inner) => {
            let inner = inner.strip_suffix(']').expect("a closing bracket");
            assert_eq!(inner.strip_suffix('.').unwrap_or(inner).to_ascii_lowercase(), host);
            assert!(host.parse::<Ipv6Addr>().is_ok(), "{written}");
        }
        None => {
            assert!(!host.contains(':'), "{written}");
            let bare = written_host.strip_suffix('.').unwrap_or(written_host);
            assert_eq!(bare.to_ascii_lowercase(), host);
        }
    }
});
