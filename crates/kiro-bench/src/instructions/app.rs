//! What stands behind the sidecars while they are counted? A server that reads a request whole and answers it in one piece, so that
//! nothing but its answer's size shows in the figures.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::Context as _;

use crate::ports;

const ANSWER: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 12\r\n\r\nhello world\n";

/// Starts it: it lives as long as this process, and works only when it is called.
pub(super) fn start() -> anyhow::Result<SocketAddr> {
    let address = ports::free()?;
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    std::thread::Builder::new()
        .name("app".to_owned())
        .spawn(move || {
            for stream in listener.incoming().flatten() {
                // A connection that fails ends its thread, and its caller says so.
                let _ = std::thread::Builder::new().spawn(move || serve(stream));
            }
        })
        .context("no thread for the application")?;
    Ok(address)
}

fn serve(stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::with_capacity(256 * 1024, stream);
    while let Some(body) = head(&mut reader)? {
        match body {
            Body::Length(length) => skip(&mut reader, length)?,
            Body::Chunked => chunks(&mut reader)?,
        }
        writer.write_all(ANSWER)?;
    }
    Ok(())
}

/// How a request's body is framed.
enum Body {
    Length(u64),
    Chunked,
}

/// Reads a head; `None` where the connection has ended between two requests.
fn head(reader: &mut BufReader<TcpStream>) -> io::Result<Option<Body>> {
    let (mut body, mut begun) = (Body::Length(0), false);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return if begun { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(None) };
        }
        begun = true;
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            return Ok(Some(body));
        }
        if let Some(length) = line.strip_prefix("content-length:") {
            body = Body::Length(length.trim().parse().map_err(io::Error::other)?);
        } else if line.starts_with("transfer-encoding:") {
            body = Body::Chunked;
        }
    }
}

fn skip(reader: &mut BufReader<TcpStream>, length: u64) -> io::Result<()> {
    let read = io::copy(&mut reader.take(length), &mut io::sink())?;
    if read < length { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

fn chunks(reader: &mut BufReader<TcpStream>) -> io::Result<()> {
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let length = u64::from_str_radix(line.trim_end(), 16).map_err(io::Error::other)?;
        if length > 0 {
            skip(reader, length + 2)?;
            continue;
        }
        // Trailers, and the empty line.
        while line.trim_end() != "" {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        return Ok(());
    }
}
