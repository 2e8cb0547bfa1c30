//! Signatures of applications pass: stepped over by the verifier, untouched by `strip`.

use super::*;

/// Fields with which applications sign, by RFC 9421 or something older, each as its lines.
const FOREIGN: [&[(&str, &str)]; 6] = [
    &[
        (
            "signature-input",
            r#"sig1=("@method" "x";key="a,b" "c\"d\\";bs);created=1;keyid="k, \"=\"";nonce="kiro";tag="kirosene""#,
        ),
        ("signature", "sig1=:AAAA:"),
    ],
    &[
        ("signature-input", r#"a=();expires=-1;x=?1;y=1.5;z=tok*en/:, b=("date");d=@17;e=%"f%c3%bc""#),
        ("signature-input", r#"c=(), d;flag, e=1;tag="other""#),
        ("signature", "a=:AAAA:\t,\tb=::"),
        ("signature", "c=:AQ==:"),
    ],
    // Not RFC 9421: the draft that some of the world still speaks.
    &[("signature", r#"keyId="k",algorithm="hs2019",headers="(request-target) date",signature="AAAA""#)],
    // A label that begins like ours.
    &[("signature-input", "kiro2=(\"@method\"), kir=()"), ("signature", "kiro2=:AAAA:, kir=:AAAA:")],
    &[("signature-input", "")],
    // No dictionaries at all.
    &[
        ("signature-input", "\"open, kiro=("),
        ("signature-input", "sig1=(\"x\";tag=kiro), ,"),
        ("signature", ";;;"),
    ],
];

fn with(fields: &[(&'static str, &'static str)]) -> Message {
    let mut message = message();
    for (name, value) in fields {
        message.append(name, value);
    }
    message
}

#[test]
fn foreign_signatures_pass_untouched() {
    for fields in FOREIGN {
        let before = with(fields);
        let mut message = signed(before.clone());
        verify(&message).unwrap_or_else(|error| panic!("{fields:?}: {error}"));
        strip(&mut message.headers);
        assert_eq!(message.headers, before.headers, "{fields:?}");
        // Whoever joins lines (as RFC 9110 5.3 lets him) must not break anything. What is no dictionary can't be joined.
        if Dictionaries::of(&before.headers).all_parse() {
            let mut joined = signed(before.clone());
            for name in ["signature-input", "signature"] {
                let all = lines(&joined.headers, name).join(",");
                joined.set(name, all.trim_start_matches(','));
            }
            verify(&joined).unwrap_or_else(|error| panic!("{fields:?}, joined: {error}"));
            strip(&mut joined.headers);
            assert!(!lines(&joined.headers, "signature-input").join(",").contains("kiro="), "{fields:?}");
        }
    }
}

struct Dictionaries(Vec<String>);

impl Dictionaries {
    fn of(headers: &HeaderMap) -> Self {
        Self([lines(headers, "signature-input"), lines(headers, "signature")].concat())
    }

    fn all_parse(&self) -> bool {
        self.0.iter().all(|line| {
            let mut dictionary = dictionary::Dictionary::new(line.as_bytes());
            loop {
                match dictionary.next_member() {
                    Ok(Some(_)) => {}
                    Ok(None) => break true,
                    Err(_) => break false,
                }
            }
        })
    }
}

#[test]
fn dictionaries_are_told_from_what_is_none() {
    let parses = |line: &str| Dictionaries(vec![line.to_owned()]).all_parse();
    for line in [
        "",
        "  ",
        "a",
        "a;b",
        "a;b;c=1",
        "a=1",
        "  a=1 ",
        "a=1,b=2",
        "a=1\t ,\t b=2",
        "a=?0",
        "a=?1",
        "a=-1",
        "a=1.25",
        "a=123456789012345",
        "a=123456789012.123",
        "a=@-1",
        "a=tok:en/x",
        "a=*t",
        "*a=1",
        "a_-.*1=1",
        "a=::",
        "a=:AA==:",
        r#"a="""#,
        r#"a="\"\\""#,
        r#"a=%"%c3%bc""#,
        "a=()",
        "a=( )",
        "a=(1 2)",
        "a=( 1  2 )",
        "a=(1;x 2;y=\"z\");p",
        "a; b=1",
        "a=1, a=2",
    ] {
        assert!(parses(line), "{line}");
    }
    for line in [
        ",",
        "a,",
        "a, ",
        "a,,b",
        "a=1 b=2",
        "A=1",
        "1=1",
        "a=",
        "a=?2",
        "a=?",
        "a=-",
        "a=1.",
        "a=1.1234",
        "a=.5",
        "a=1234567890123456",
        "a=-.5",
        "a=1234567890123.1",
        "a=@",
        "a=@x",
        "a=%x",
        "a=%\"%C3\"",
        "a=%\"%c\"",
        "a=%\"",
        "a=:A",
        "a=:A-:",
        r#"a=""#,
        r#"a="\x""#,
        r#"a="\"#,
        "a=\"\u{7f}\"",
        "a=\"\t\"",
        "a=(",
        "a=(1",
        "a=(1,2)",
        "a=(1\t2)",
        "a=(1\"x\")",
        "a=((1))",
        "a;",
        "a;B",
        "a;b=",
        "a;b=()",
        "a=(1)2",
        "\ta",
        "a=é",
        "a =1",
        "a= 1",
    ] {
        assert!(!parses(line), "{line}");
    }
}

#[test]
fn a_malformed_line_of_ours_is_malformed() {
    for (name, value) in [
        ("signature-input", "kiro=("),
        ("signature-input", "kiro=(), \"x"),
        ("signature-input", "a=(), kiro=();tag=\"kiro\" x"),
        ("signature", "kiro=:AAAA:, ,"),
        ("signature", "kiro=\"a, b"),
    ] {
        let mut message = signed(with(&[("signature-input", "sig1=()"), ("signature", "sig1=:AAAA:")]));
        message.append(name, value);
        assert_eq!(verify(&message), Err(SignatureError::Malformed(name)), "{value}");
    }
}

#[test]
fn strip_takes_ours_out_of_shared_lines() {
    for (before, after) in [
        ("kiro=:AA==:", &[][..]),
        ("kiro", &[]),
        ("kiro=garbage(", &[]),
        ("kiro=:AA==:, sig1=:AAAA:", &["sig1=:AAAA:"]),
        ("sig1=:AAAA: ,  kiro=:AA==:", &["sig1=:AAAA:"]),
        (
            "sig1=:AAAA:;a;b=\"c, kiro=1\",kiro=:AA==:,sig2=:BBBB:",
            &["sig1=:AAAA:;a;b=\"c, kiro=1\", sig2=:BBBB:"],
        ),
        ("kiro=:AA==:, kiro=:AAAA:", &[]),
        ("sig1=\"kiro=:AA==:\"", &["sig1=\"kiro=:AA==:\""]),
        ("sig1=:AAAA:,sig2=::  ", &["sig1=:AAAA:,sig2=::  "]),
    ] {
        for name in ["signature", "signature-input"] {
            let mut headers = HeaderMap::new();
            headers.append(name, before.parse().unwrap());
            strip(&mut headers);
            assert_eq!(lines(&headers, name), after, "{before}");
            // The same beside a line of somebody else.
            headers = HeaderMap::new();
            headers.append(name, "first=:AA==:".parse().unwrap());
            headers.append(name, before.parse().unwrap());
            strip(&mut headers);
            assert_eq!(lines(&headers, name), [&["first=:AA==:"], after].concat(), "{before}");
        }
    }
}

#[test]
fn what_an_application_signs_with_our_label_is_replaced() {
    let mut message = with(&[
        ("signature-input", "kiro=(), sig1=()"),
        ("signature", "kiro=:AAAA:"),
        ("signature", "sig1=:AA==:"),
    ]);
    message = signed(message);
    verify(&message).unwrap();
    strip(&mut message.headers);
    assert_eq!(lines(&message.headers, "signature-input"), ["sig1=()"]);
    assert_eq!(lines(&message.headers, "signature"), ["sig1=:AA==:"]);
}

#[test]
fn what_would_be_taken_for_ours_is_not_signed() {
    for fields in [
        &[("signature-input", "sig1=();tag=\"kiro\"")][..],
        &[("signature-input", "sig1=(), sig2=(\"date\");a=1;tag=\"kiro-trailers\"")],
        &[("signature-input", "sig1=()"), ("signature-input", "kiro=(, ")],
        &[("signature", "kiro=\"a, b")],
    ] {
        let mut message = with(fields);
        let before = message.clone();
        assert_eq!(
            signer().sign(&before.head(), &mut message.headers, NOW),
            Err(SignError::Reserved),
            "{fields:?}"
        );
        assert_eq!(message.headers, before.headers);
    }
}
