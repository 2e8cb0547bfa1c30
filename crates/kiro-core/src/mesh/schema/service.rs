//! What does one entry of `services` say, and do its ports collide?

use std::net::SocketAddr;

use super::super::problem::{Found, Read};
use super::super::read::{Fields, Spot};
use super::super::{App, AppTls, HeaderCase, Ingress, Metrics, Protocol, SIDECAR_PORTS, Service};
use super::health::health;
use super::traffic::traffic;
use super::{DeclaredService, local};
use crate::authority;

/// Reads one service.
pub(super) fn service(spot: &Spot<'_>, found: &mut Found) -> DeclaredService {
    let fix = "write at least `app: { port: 8080 }`, with the port of the application";
    let keys = ["app", "ingress", "traffic", "health", "endpoints", "metrics", "local_port"];
    let fields = match spot.fields(&keys, fix, found) {
        Ok(fields) => fields,
        Err(reported) => {
            let service = Err(reported);
            return DeclaredService { service, tcp: false, ingress: None, ports: Vec::new(), found_at: None };
        }
    };
    let app =
        fields.required("app", "add `app: { port: 8080 }`, with the port of the application", found, app);
    let tcp = app.as_ref().is_ok_and(|app| app.protocol == Protocol::Tcp);
    let ingress = fields.optional("ingress", found, |spot, found| {
        if tcp {
            let fix = "take the ingress out, or leave `app.protocol: tcp` out";
            return Err(spot.wrong(
                "an ingress, which speaks HTTP, before an application that does not",
                fix,
                found,
            ));
        }
        ingress(&spot, found)
    });
    let traffic = fields.optional("traffic", found, |spot, found| traffic(&spot, tcp, found));
    let protocol = app.as_ref().ok().map(|app| app.protocol);
    let health = fields.optional("health", found, |spot, found| health(&spot, protocol, found));
    let endpoints = fields.optional("endpoints", found, |spot, found| {
        let fix = "write a list like `[\"127.0.0.1:15006\"]`, or leave `endpoints` out to resolve the service's name";
        spot.filled_list(fix, found, endpoint)
    });
    let metrics = fields.optional("metrics", found, |spot, found| {
        spot.one_of(&[("closed", Metrics::Closed), ("open", Metrics::Open)], found)
    });
    let local_port = fields.optional("local_port", found, |spot, found| local::port(&spot, protocol, found));
    let ports = check_ports(&fields, found);
    let found_at = tcp.then(|| local::found_at(&fields)).flatten();
    let ingress_at = fields.get("ingress").map(|spot| spot.at);
    let service = || {
        Ok(Service {
            app: app?,
            ingress: ingress?,
            traffic: traffic?.unwrap_or_default(),
            health: health?,
            endpoints: endpoints?.unwrap_or_default(),
            metrics: metrics?.unwrap_or_default(),
            local_port: local_port?,
        })
    };
    DeclaredService { service: service(), tcp, ingress: ingress_at, ports, found_at }
}

fn app(spot: Spot<'_>, found: &mut Found) -> Read<App> {
    let keys = ["port", "tls", "protocol", "header_case"];
    let fields = spot.fields(&keys, "write it like `app: { port: 8080 }`", found)?;
    let port = fields
        .required("port", "add `port: ` and the application's port", found, |spot, found| spot.port(found));
    let tls = fields.optional("tls", found, |spot, found| {
        spot.one_of(&[("none", AppTls::None), ("mutual", AppTls::Mutual)], found)
    });
    let protocol = fields.optional("protocol", found, |spot, found| {
        let words = [
            ("http1", Protocol::Http1),
            ("h2", Protocol::H2),
            ("grpc", Protocol::Grpc),
            ("tcp", Protocol::Tcp),
        ];
        spot.one_of(&words, found)
    });
    let http1 = !matches!(protocol, Ok(Some(Protocol::H2 | Protocol::Grpc | Protocol::Tcp)));
    let header_case = fields.optional("header_case", found, |spot, found| {
        if !http1 {
            let fix = "take `header_case` out: HTTP/2 has lower case alone, and bytes have no fields";
            return Err(spot.wrong("for applications that speak HTTP/1.1", fix, found));
        }
        spot.one_of(&[("lower", HeaderCase::Lower), ("title", HeaderCase::Title)], found)
    });
    Ok(App {
        port: port?,
        tls: tls?.unwrap_or_default(),
        protocol: protocol?.unwrap_or_default(),
        header_case: header_case?.unwrap_or_default(),
    })
}

fn ingress(spot: &Spot<'_>, found: &mut Found) -> Read<Ingress> {
    const FIX: &str = "write `port: 8080` for HTTP, `tls_port: 8443` for TLS, or both";
    let fields = spot.fields(&["port", "tls_port", "names", "trust_forwarded", "healthz"], FIX, found)?;
    let port = fields.optional("port", found, |spot, found| spot.port(found));
    let tls_port = fields.optional("tls_port", found, |spot, found| spot.port(found));
    let names = fields.optional("names", found, |spot, found| {
        spot.filled_list("leave `names` out, or name some, like `[www.example.com]`", found, dns_name)
    });
    let trust_forwarded = fields.optional("trust_forwarded", found, |spot, found| spot.boolean(found));
    let healthz = fields.optional("healthz", found, |spot, found| spot.boolean(found));
    let (port, tls_port) = match (port?, tls_port?) {
        (None, None) => return Err(fields.lacks("the ingress has no port", FIX, found)),
        ports => ports,
    };
    Ok(Ingress {
        port,
        tls_port,
        names: names?.unwrap_or_default(),
        trust_forwarded: trust_forwarded?.unwrap_or_default(),
        healthz: healthz?.unwrap_or_default(),
    })
}

fn dns_name(spot: Spot<'_>, found: &mut Found) -> Read<String> {
    const FIX: &str = "write a DNS name in lower case, like `www.example.com`";
    let text = spot.word(FIX, found)?;
    match authority::service_of(text) {
        // What the function had to change is not the name itself.
        Ok(name) if name == text => Ok(text.to_owned()),
        Ok(name) => Err(spot.wrong("not a bare DNS name", format!("write `{name}`"), found)),
        Err(_) => Err(spot.wrong("not a DNS name", FIX, found)),
    }
}

fn endpoint(spot: Spot<'_>, found: &mut Found) -> Read<SocketAddr> {
    const FIX: &str =
        "write an address and a port, in quotes, like `\"127.0.0.1:15006\"` or `\"[::1]:15006\"`";
    let text = spot.word(FIX, found)?;
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() > 0 && !address.ip().is_unspecified() => Ok(address),
        Ok(_) | Err(_) => Err(spot.wrong("not an address with a port that can be dialled", FIX, found)),
    }
}

/// Everything in a pod shares its ports, so each is claimed once. Gives those of the service, with the keys that claim them.
fn check_ports(fields: &Fields<'_>, found: &mut Found) -> Vec<(u16, &'static str)> {
    let mut taken = SIDECAR_PORTS.to_vec();
    let keys = [
        ("app", "port", "app.port"),
        ("ingress", "port", "ingress.port"),
        ("ingress", "tls_port", "ingress.tls_port"),
    ];
    for (section, key, name) in keys {
        let Some(section) = fields.get(section) else { continue };
        let Some(spot) = section.get(key) else { continue };
        let Some(port) = spot.port_if_right() else { continue };
        match taken.iter().find(|(other, _)| *other == port) {
            Some((_, by)) => {
                spot.wrong(
                    format!("a port that {by} has already"),
                    "choose another one that is free in the pod",
                    found,
                );
            }
            None => taken.push((port, name)),
        }
    }
    taken.split_off(SIDECAR_PORTS.len())
}
