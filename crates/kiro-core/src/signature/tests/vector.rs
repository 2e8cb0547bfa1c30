//! RFC 9421 B.2.5, the one HMAC vector there is, through the code that signs requests.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::*;

const RFC_KEY: &str =
    "uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ==";
const RFC_MAC: &str = "pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=";
const RFC_PARAMETERS: &str =
    r#"("date" "@authority" "content-type");created=1618884473;keyid="test-shared-secret""#;
const RFC_COMPONENTS: [(&str, &str); 3] = [
    ("date", "Tue, 20 Apr 2021 02:07:55 GMT"),
    ("@authority", "example.com"),
    ("content-type", "application/json"),
];

fn fits(key: &str, form: Form, components: &[(&str, &str)], parameters: &str) -> bool {
    let key = ConnectionKey::from_mac_key(&STANDARD.decode(key).unwrap());
    let lines: Vec<Line<'_>> =
        components.iter().map(|(name, value)| Line { name, value: Value::Text(value.as_bytes()) }).collect();
    let mac = mac(&key, form, lines.iter(), parameters.as_bytes());
    mac.verify_slice(&STANDARD.decode(RFC_MAC).unwrap()).is_ok()
}

#[test]
fn the_vector_holds() {
    assert!(fits(RFC_KEY, Form::Head, &RFC_COMPONENTS, RFC_PARAMETERS));
}

#[test]
fn the_vector_is_written_as_we_write_lists() {
    let lines = RFC_COMPONENTS.map(|(name, _)| Line { name, value: Value::Text(b"") });
    let mut list = Vec::new();
    member::write_list(&mut list, Form::Head, lines.iter());
    assert!(RFC_PARAMETERS.as_bytes().starts_with(&list));
}

#[test]
fn nothing_of_the_vector_can_be_changed() {
    let [date, authority, content_type] = RFC_COMPONENTS;
    for components in [
        &[("date", "Tue, 20 Apr 2021 02:07:56 GMT"), authority, content_type][..],
        &[date, ("@authority", "example.org"), content_type],
        &[date, ("@authority", ""), content_type],
        &[date, authority, ("content-type", "application/jso")],
        &[date, authority, ("content-typ", "eapplication/json")],
        &[authority, date, content_type],
        &[date, authority],
        &[date, authority, content_type, ("@query", "?")],
        &[date, authority, content_type, content_type],
    ] {
        assert!(!fits(RFC_KEY, Form::Head, components, RFC_PARAMETERS), "{components:?}");
    }
    for parameters in [
        r#"("date" "@authority" "content-type");created=1618884474;keyid="test-shared-secret""#,
        r#"("date" "@authority" "content-type");created=1618884473;keyid="test-shared-secrets""#,
        r#"("date" "@authority" "content-type");keyid="test-shared-secret";created=1618884473"#,
        r#"("date" "@authority"  "content-type");created=1618884473;keyid="test-shared-secret""#,
        r#"("date" "@authority" "content-type");created=1618884473;keyid="test-shared-secret";alg="hmac-sha256""#,
        "",
    ] {
        assert!(!fits(RFC_KEY, Form::Head, &RFC_COMPONENTS, parameters), "{parameters}");
    }
    assert!(!fits(RFC_KEY, Form::Trailers, &RFC_COMPONENTS, RFC_PARAMETERS));
    let other = RFC_KEY.replacen('u', "v", 1);
    assert!(!fits(&other, Form::Head, &RFC_COMPONENTS, RFC_PARAMETERS));
}

/// The derivation of the key, written out with RFC 5869's two steps.
#[test]
fn the_connections_key_is_hkdf_of_secret_exporter_and_keyid() {
    let hmac = |key: &[u8], parts: &[&[u8]]| -> [u8; 32] {
        let mut mac = ConnectionKey::from_mac_key(key).mac();
        parts.iter().for_each(|part| mac.update(part));
        mac.finalize().into_bytes().into()
    };
    let extracted = hmac(&EXPORTER, &[&[1; 32]]);
    let expanded = hmac(&extracted, &[b"kiro signature v1 ", KEYID.as_bytes(), &[1]]);
    assert_eq!(hmac(&expanded, &[b"a request"]), {
        let mut mac = key().mac();
        mac.update(b"a request");
        <[u8; 32]>::from(mac.finalize().into_bytes())
    });
}
